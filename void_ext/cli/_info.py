"""``void-ext info``: what this build is, what it runs on here, what falls back and why. Needs no native library."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
from typing import Any

import void_ext
from void_ext.cli._console import Terminal

_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "matplotlib", "rich", "gguf", "accelerate")


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    found = gather()
    if arguments.json:
        terminal.document(json.dumps(found, indent=2))
    else:
        _print(found, terminal)
    return 0


def gather() -> dict[str, Any]:
    """All that is known, ready for ``json.dumps``."""
    import torch

    from void_ext import _library

    library: dict[str, Any]
    try:
        library = {"built": True, **_library.build_info()}
        _library.load()
    except void_ext.LibraryError as error:
        library = {"built": False, "error": str(error)}
    arches = library.get("cuda_arches", [])
    found = {
        "void_ext": void_ext.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "library": library,
        "threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "devices": _devices(arches),
    }
    return {**found, "notes": _notes(found)}


def coverage(arches: list[str], major: int, minor: int) -> str | None:
    """What the binary has for a device of this compute capability: ``"sm_90"``, ``"PTX of 120"`` or None.

    An image runs on devices of its major number whose minor number is not lower (with the suffix a: on its own
    capability only); PTX is compiled by the driver for its own and every later capability.
    """
    device = 10 * major + minor
    best: tuple[int, str] | None = None
    ptx: str | None = None
    for arch in arches:
        match = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            continue
        number, suffix = int(match[1]), match[2]
        runs = number == device if suffix == "a" else number // 10 == major and number <= device
        if runs and (best is None or number >= best[0]):
            best = number, f"sm_{number}{suffix}"
        if match[3] and number <= device and suffix == "":
            ptx = f"PTX of {number}"
    return best[1] if best else ptx


def _devices(arches: list[str]) -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "covered_by": coverage(arches, properties.major, properties.minor),
            }
        )
    return devices


def _notes(found: dict[str, Any]) -> list[str]:
    """What does not work as well as it could here, and why."""
    library, notes = found["library"], []
    if not library["built"]:
        notes.append(f"nothing can be traced: {library['error']}")
    elif not library["cuda"]:
        notes.append(f"CUDA ops are not in this build: {library['cuda_reason']}")
    if found["torch_cuda"] is None:
        notes.append("this torch is a CPU build: the CPU kernels are used")
    elif not found["devices"]:
        notes.append("torch sees no CUDA device: the CPU kernels are used")
    for device in found["devices"]:
        if library.get("cuda") and device["covered_by"] is None:
            capability = device["capability"]
            notes.append(
                f"no image and no PTX for {device['name']} ({capability}): ops on it fail; "
                f"build again with TORCH_CUDA_ARCH_LIST={capability}"
            )
        elif library.get("cuda") and device["covered_by"].startswith("PTX"):
            notes.append(
                f"{device['name']}: no image for it, the driver compiles the {device['covered_by']} at first use"
            )
    needed_by = {"transformers": "patch, trace and demo", "matplotlib": "pictures", "gguf": "the first use of smollm2"}
    for name, purpose in needed_by.items():
        if found["packages"][name] is None:
            notes.append(f"the package {name} is missing, needed by {purpose}: pip install {name}")
    return notes


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(found: dict[str, Any], terminal: Terminal) -> None:
    library = found["library"]

    def line(name: str, value: str) -> None:
        terminal.out.print(f"{name:<13} ", style="bold", end="", markup=False, highlight=False)
        terminal.print(value)

    line("void_ext", found["void_ext"])
    line("python", f"{found['python']}  {found['executable']}")
    line("packages", ", ".join(f"{name} {version or '–'}" for name, version in found["packages"].items()))
    if library["built"]:
        line(
            "library",
            f"torch >= {library['torch_target']}, built against {library['torch_built']}, {library['compiler']}",
        )
        line(
            "CPU kernels",
            f"{library['cpu_isa']} in use (of {', '.join(library['cpu_isas'])}), {found['threads']} threads",
        )
        arches = ", ".join(library["cuda_arches"])
        line("CUDA kernels", f"CUDA {library['cuda_version']}: {arches}" if library["cuda"] else "not built")
    else:
        line("library", "not built")
    for device in found["devices"]:
        covered = device["covered_by"] or "not covered"
        text = f"{device['name']}, {device['capability']}, {device['memory_gib']} GiB: {covered}"
        line(f"GPU {device['index']}", text)
    if not found["devices"]:
        line("GPU", "none")
    for note in found["notes"]:
        line("note", note)
