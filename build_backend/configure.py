"""Decides what is built: against which torch, with or without CUDA, for which architectures; and why.

setup.py passes the decision to CMake. Run as a script it prints the same as CMake code, for IDEs that call CMake alone.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from find_cuda import Arch, CudaError, Toolkit, arches_for, find_toolkit
from find_torch import Torch, find_torch

try:
    import pybind11
except ImportError:
    raise SystemExit("\nerror: pybind11 is needed to build void-ext, and missing: pip install pybind11\n") from None

SOURCE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Configuration:
    """The decision; `toolkit` is None in a build without CUDA."""

    torch: Torch
    toolkit: Toolkit | None
    arches: list[Arch]
    cuda_reason: str

    def cmake(self) -> dict[str, str]:
        """The variables that CMakeLists.txt expects."""
        variables = {
            "VOID_EXT_TORCH_DIR": str(self.torch.directory),
            "VOID_EXT_TORCH_VERSION": self.torch.version,
            "VOID_EXT_PYBIND11_INCLUDE": pybind11.get_include(),
            "VOID_EXT_CUDA": "ON" if self.toolkit else "OFF",
            "VOID_EXT_CUDA_REASON": self.cuda_reason,
            "VOID_EXT_CUDA_VERSION": self.toolkit.version if self.toolkit else "",
            "VOID_EXT_CUDA_ARCH_NAMES": " ".join(map(str, self.arches)),
        }
        if self.toolkit:
            variables["CMAKE_CUDA_COMPILER"] = str(self.toolkit.nvcc)
            variables["CMAKE_CUDA_ARCHITECTURES"] = ";".join(arch.cmake for arch in self.arches)
        return variables

    def report(self) -> str:
        """What was decided and why, for a person."""
        torch = self.torch
        lines = [f"void-ext: torch {torch.version} in {torch.directory} ({torch.found_by})"]
        if self.toolkit is None:
            lines.append(f"void-ext: CUDA no: {self.cuda_reason}")
            return "\n".join(lines)
        lines.append(f"void-ext: CUDA yes: {self.cuda_reason}; toolkit {self.toolkit.home}")
        lines.append(f"void-ext: architectures {', '.join(map(str, self.arches))}")
        if torch.cuda and torch.cuda.split(".")[0] != self.toolkit.version.split(".")[0]:
            lines.append(
                f"void-ext: note: torch was built with CUDA {torch.cuda}, the kernels are with {self.toolkit.version}; "
                "the driver must know the newer of the two"
            )
        return "\n".join(lines)


def decide() -> Configuration:
    """Reads VOID_EXT_CUDA (auto, 1, 0), TORCH_CUDA_ARCH_LIST, VOID_EXT_TORCH_DIR and the machine.

    Raises:
        TorchNotFoundError: no usable torch.
        CudaError: VOID_EXT_CUDA=1 without a toolkit, or a value that makes no sense.
    """
    wish = os.environ.get("VOID_EXT_CUDA", "") or "auto"
    if wish not in ("auto", "1", "0"):
        raise CudaError(f"VOID_EXT_CUDA: expected auto, 1 or 0, got {wish!r}")
    torch = find_torch(SOURCE)
    if wish == "0":
        return Configuration(torch, None, [], "VOID_EXT_CUDA=0")
    toolkit = find_toolkit(torch.directory)
    if isinstance(toolkit, str):
        if wish == "1":
            raise CudaError(
                f"VOID_EXT_CUDA=1, but {toolkit}. Install a CUDA toolkit, or set CUDA_HOME to where it lies"
            )
        return Configuration(torch, None, [], toolkit)
    reason = f"nvcc {toolkit.version} found by {toolkit.found_by}"
    return Configuration(torch, toolkit, arches_for(toolkit), reason)


def main() -> None:
    """CMake code on stdout, the report on stderr."""
    configuration = decide()
    print(configuration.report(), file=sys.stderr)
    for name, value in configuration.cmake().items():
        print(f"set({name} [==[{value}]==])")


if __name__ == "__main__":
    main()
