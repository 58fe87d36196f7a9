"""Finds the torch that the built package will meet, without importing it: only its headers and libraries are needed.

Build isolation hides the environment that is installed into, but not where it lies: pip runs the build with that
environment's interpreter, uv leaves its traces in PATH and in the project's .venv. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MINIMUM = (2, 11)


class TorchNotFoundError(RuntimeError):
    """No usable torch; the message lists where it was looked for and what to do."""


@dataclass(frozen=True)
class Torch:
    """An installed torch: its package directory, version, the CUDA it was built with, and how it was found."""

    directory: Path
    version: str
    cuda: str | None
    found_by: str


def find_torch(source: Path) -> Torch:
    """The first torch >= 2.11 with headers.

    Args:
        source: the project's directory; its ``.venv`` is one of the places.
    Raises:
        TorchNotFoundError: none found, or VOID_EXT_TORCH_DIR names something else.
    """
    seen: dict[Path, str] = {}
    for directory, found_by in _candidates(source):
        if directory in seen:
            continue
        verdict = _inspect(directory, found_by)
        if isinstance(verdict, Torch):
            return verdict
        seen[directory] = f"  {directory} ({found_by}): {verdict}"
        if found_by == "VOID_EXT_TORCH_DIR":
            break
    looked = "\n".join(seen.values())
    raise TorchNotFoundError(
        f"void-ext is built against the torch (>= {'.'.join(map(str, MINIMUM))}) that is installed, and found none:\n"
        f"{looked}\n"
        "Install torch into the environment first, then one of:\n"
        "  pip install .\n"
        "  pip install --no-build-isolation .      (needs setuptools>=77, pybind11, cmake>=3.24 and ninja there)\n"
        "  uv pip install --no-build-isolation .   (the same)\n"
        "  VOID_EXT_TORCH_DIR=/path/to/site-packages/torch pip install .   (where torch is in an unusual place)"
    )


def _candidates(source: Path) -> Iterator[tuple[Path, str]]:
    if explicit := os.environ.get("VOID_EXT_TORCH_DIR"):
        yield Path(explicit), "VOID_EXT_TORCH_DIR"
        return
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent, "importable here"
    for scheme in ("platlib", "purelib"):
        yield Path(sysconfig.get_path(scheme)) / "torch", "the interpreter's environment"
    for variable in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            yield from _environment(Path(prefix), variable)
    yield from _environment(source / ".venv", "the project's .venv")
    for entry in os.environ.get("PATH", "").split(os.pathsep):
        if entry and (Path(entry).parent / "pyvenv.cfg").is_file():
            yield from _environment(Path(entry).parent, "a virtual environment on PATH")
    if sys.prefix == sys.base_prefix or _sees_system(Path(sys.prefix)):
        yield Path(site.getusersitepackages()) / "torch", "the user's packages"
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        for scheme in ("platlib", "purelib"):
            yield Path(sysconfig.get_path(scheme, vars=base)) / "torch", "the base interpreter"


def _environment(prefix: Path, found_by: str) -> Iterator[tuple[Path, str]]:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for library in ("lib", "lib64"):
        yield prefix / library / version / "site-packages" / "torch", found_by


def _sees_system(prefix: Path) -> bool:
    settings = prefix / "pyvenv.cfg"
    return settings.is_file() and "include-system-site-packages = true" in settings.read_text()


def _inspect(directory: Path, found_by: str) -> Torch | str:
    """The torch in `directory`, or why it will not do."""
    try:
        text = (directory / "version.py").read_text()
    except OSError:
        return "no torch"
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    if version is None:
        return "its version.py names no version"
    numbers = re.match(r"(\d+)\.(\d+)", version[1])
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MINIMUM:
        return f"torch {version[1]} is older than {'.'.join(map(str, MINIMUM))}"
    for needed in ("include/torch/csrc/stable/library.h", "lib/libtorch.so", "lib/libtorch_cpu.so"):
        if not (directory / needed).exists():
            return f"torch {version[1]} without {needed}"
    cuda = re.search(r"^cuda: [^=]*= '([^']+)'", text, re.MULTILINE)
    return Torch(directory.resolve(), version[1], cuda[1] if cuda else None, found_by)
