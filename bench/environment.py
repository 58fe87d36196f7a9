"""What every result carries: where and with what it was measured."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@functools.cache
def commit() -> str:
    """VOID_EXT_COMMIT, for a copy of the tree; else the commit, ``+changes`` where the tree differs from it."""
    try:
        if named := os.environ.get("VOID_EXT_COMMIT"):
            return named
        name = _git("rev-parse", "--short=12", "HEAD")
        return name + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def sources() -> str:
    """A hash of the code measured and of what measures it, also where there is no git: results resume for the same."""
    digest = hashlib.sha256()
    for name in ("csrc", "void_ext", "python_tests", "bench", "build_backend", "setup.py", "CMakeLists.txt"):
        place = ROOT / name
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            kept = path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h", ".txt"} and RESULTS not in path.parents
            if kept and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def describe(device: str = "cpu") -> dict[str, Any]:
    """Machine, device, versions and commit, JSON-ready; what cannot be found out is left empty."""
    facts: dict[str, Any] = {
        "device": _cpu_name(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": commit(),
        "sources": sources(),
    }
    for package in ("torch", "transformers", "triton", "void_ext"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    facts["torch"] = torch.__version__
    with contextlib.suppress(ImportError):
        from void_ext import _library

        facts["build"] = _library.build_info()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "device": properties.name,
            "sm": f"{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return facts


def write_json(path: Path, content: object) -> None:
    """Write whole or not at all, and a copy under $OUT where that is set."""
    text = json.dumps(content, indent=1) + "\n"
    places = [path]
    if os.environ.get("OUT"):
        places.append(Path(os.environ["OUT"]) / path.name)
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(place.name + ".partial")
        partial.write_text(text)
        partial.replace(place)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    return ""
