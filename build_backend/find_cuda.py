"""Finds a CUDA toolkit that can compile the kernels, and decides for which architectures.

The nvcc on PATH may be a shell wrapper, so its own word (`nvcc --dryrun`, TOP=) is taken for where the toolkit lies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHES = ("80", "86", "89", "90", "100", "120")


class CudaError(RuntimeError):
    """CUDA was asked for and cannot be had, or VOID_EXT_CUDA or TORCH_CUDA_ARCH_LIST make no sense."""


@dataclass(frozen=True)
class Toolkit:
    """A toolkit with compiler, headers and the static runtime, and how it was found."""

    home: Path
    version: str
    found_by: str
    targets: frozenset[str]  # what nvcc compiles for: "80", "90a", …

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


@dataclass(frozen=True)
class Arch:
    """One entry of the list: machine code for `number`, and PTX of it as well where `ptx`."""

    number: str
    ptx: bool = False

    def __str__(self) -> str:
        return self.number + ("+PTX" if self.ptx else "")

    @property
    def cmake(self) -> str:
        return self.number if self.ptx else f"{self.number}-real"


def find_toolkit(torch_directory: Path) -> Toolkit | str:
    """The first complete toolkit, or why there is none, in one line."""
    refused: dict[Path, str] = {}
    for home, found_by in _candidates(torch_directory):
        if home in refused:
            continue
        verdict = _inspect(home, found_by)
        if isinstance(verdict, Toolkit):
            return verdict
        refused[home] = f"{home} ({found_by}) {verdict}"
    return "no nvcc found" + ("; " + "; ".join(refused.values()) if refused else "")


def arches_for(toolkit: Toolkit) -> list[Arch]:
    """The architectures to compile for: TORCH_CUDA_ARCH_LIST, or the defaults that this nvcc knows.

    Raises:
        CudaError: an entry of TORCH_CUDA_ARCH_LIST is not like "8.0", "9.0a" or "9.0+PTX", or unknown to this nvcc.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not wanted:
        known = [number for number in DEFAULT_ARCHES if number in toolkit.targets]
        return [Arch(number, ptx=number == known[-1]) for number in known]
    arches: dict[str, Arch] = {}
    for entry in re.split(r"[;,\s]+", wanted.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise CudaError(f'TORCH_CUDA_ARCH_LIST: expected entries like "8.0", "9.0a" or "9.0+PTX", got {entry!r}')
        number = match[1] + match[2] + match[3]
        if number not in toolkit.targets:
            known_names = ", ".join(sorted(toolkit.targets, key=lambda name: (len(name), name)))
            raise CudaError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not among what nvcc {toolkit.version} compiles for: {known_names}"
            )
        previous = arches.get(number)
        arches[number] = Arch(number, ptx=bool(match[4]) or (previous is not None and previous.ptx))
    return list(arches.values())


def _candidates(torch_directory: Path) -> Iterator[tuple[Path, str]]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            yield Path(value), variable
    if nvcc := shutil.which("nvcc"):
        yield _home_of(Path(nvcc)), "nvcc on PATH"
    packages = torch_directory.parent / "nvidia"
    for home in sorted(packages.glob("cu[0-9]*"), reverse=True):
        yield home, "pip's nvidia packages"
    yield Path("/usr/local/cuda"), "the usual place"


def _home_of(nvcc: Path) -> Path:
    output = _run(nvcc, "--dryrun", "-c", "x.cu")
    top = re.search(r"^#\$ TOP=(.+)$", output or "", re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent


def _inspect(home: Path, found_by: str) -> Toolkit | str:
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        return "has no bin/nvcc"
    version = re.search(r"release (\d+\.\d+)", _run(nvcc, "--version") or "")
    targets = re.findall(r"compute_(\w+)", _run(nvcc, "--list-gpu-arch") or "")
    if version is None or not targets:
        return "has an nvcc that does not run"
    # CUDA 13's list leaves out the architecture-specific names (90a), which exist from 9.0 on.
    specific = {number + "a" for number in targets if number.isdigit() and int(number) >= 90}
    if not _any(home, "cuda_runtime.h", "include", "targets/*/include"):
        return "has no cuda_runtime.h"
    if not _any(home, "libcudart_static.a", "lib64", "lib", "targets/*/lib"):
        return "has no libcudart_static.a"
    return Toolkit(home.resolve(), version[1], found_by, frozenset(targets) | specific)


def _any(home: Path, name: str, *folders: str) -> bool:
    return any(next(home.glob(f"{folder}/{name}"), None) for folder in folders)


def _run(*command: str | Path) -> str | None:
    try:
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout + result.stderr
