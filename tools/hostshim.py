"""Builds the host shim (csrc/hostshim: the CUDA kernels compiled for the CPU) and calls it from Python.

Needs a C++17 compiler ($CXX, else g++) and no CUDA. The library is kept under build/hostshim, or in a temporary folder
where the tree cannot be written to, under a name that hashes its sources, its flags and the compiler.
``python tools/hostshim.py [--sanitize]`` builds it and prints where it is.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
UNITS = ("hostshim.cpp", "fibers.cpp")
FLAGS = (
    *("-std=c++17", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    # Rounding as on the device, where every product and sum is written out; packs alias the elements they hold.
    *("-ffp-contract=off", "-fno-strict-aliasing"),
)
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def build(sanitize: bool = False) -> Path:
    """The shared library, compiled if it is not there already (a few seconds)."""
    command = [*compiler(), *FLAGS, *(SANITIZE if sanitize else ("-O2",)), f"-I{CSRC / 'hostshim' / 'include'}"]
    try:
        version = subprocess.run([*compiler(), "--version"], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise RuntimeError(
            f"CXX: expected a C++17 compiler, got {' '.join(compiler())!r}, which is not there"
        ) from error
    digest = hashlib.sha256(repr((command, version)).encode())
    for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("kernels/**/*.cuh"), *CSRC.glob("hostshim/**/*.*")]):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    folder = _cache()
    library = folder / f"libvoid_hostshim-{'sanitize' if sanitize else 'plain'}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / library.name
            sources = [str(CSRC / "hostshim" / unit) for unit in UNITS]
            result = subprocess.run([*command, *sources, "-o", str(made)], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"the host shim does not compile:\n{shlex.join(command)}\n{result.stderr}")
            made.replace(library)
    return library


def _cache() -> Path:
    for folder in (ROOT / "build" / "hostshim", Path(tempfile.gettempdir()) / f"void_ext_hostshim_{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise RuntimeError(f"neither {ROOT / 'build'} nor {tempfile.gettempdir()} can be written to")


class Modes(ctypes.Structure):
    """csrc/args.h's AddModes. ``executed`` is 2-D; the norms of the layers before stand before the column written."""

    _fields_ = (
        ("on", ctypes.c_void_p),
        ("on_stride", ctypes.c_int64),
        ("layer", ctypes.c_int64),
        ("executed", ctypes.c_void_p),
        ("executed_stride", ctypes.c_int64),
        ("alpha", ctypes.c_float),
        ("active", ctypes.c_void_p),
        ("active_stride", ctypes.c_int64),
        ("kept", ctypes.c_void_p),
        ("kept_stride", ctypes.c_int64),
    )

    def __init__(
        self,
        on: Tensor | None = None,
        layer: int = 0,
        executed: Tensor | None = None,
        alpha: float = 0.0,
        active: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> None:
        number = ctypes.c_float(alpha)
        verdict = (*_strided(active), *_strided(kept))
        self.tensors = (on, executed, active, kept)  # theirs are the pointers
        super().__init__(*_strided(on), ctypes.c_int64(layer), *_strided(executed), number, *verdict)


class HostShim:
    """The kernels as functions of CPU tensors.

    Rows are 2-D ``[rows, width]`` with stride(1) == 1 and any row stride and offset; ``norms`` and ``updates`` are the
    one column that is written, 1-D with any stride. Nothing is checked but the type: that is the ops' business.
    Raises RuntimeError where the kernel diverges or the launch is refused.
    """

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.void_shim_error.restype = ctypes.c_char_p
        self.configure()

    def configure(self, grid_limit: int = 2**31 - 1, last_warp_first: bool = False) -> None:
        """How many blocks a launch may have (kernels loop over the rest), and the order in which warps run."""
        self.library.void_shim_configure(ctypes.c_int64(grid_limit), ctypes.c_int(last_warp_first))

    @property
    def threads_per_row(self) -> int:
        """Of the latest launch."""
        return int(self.library.void_shim_threads_per_row())

    def add_l2norm(
        self,
        residual: Tensor,
        update: Tensor,
        out: Tensor,
        norms: Tensor,
        updates: Tensor | None = None,
        modes: Modes | None = None,
    ) -> None:
        self._call("add_l2norm", _dtype(residual), *_add(residual, update, out, norms, updates), _modes(modes))

    def add_rms_norm(
        self,
        residual: Tensor,
        update: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        normed: Tensor,
        norms: Tensor | None,
        updates: Tensor | None = None,
        modes: Modes | None = None,
        zero_centered: bool = False,
    ) -> None:
        scale = (_pointer(weight), _dtype(weight), ctypes.c_int(zero_centered), ctypes.c_float(eps))
        add = (*_add(residual, update, out, norms, updates), _modes(modes))
        self._call("add_rms_norm", _dtype(residual), *add, *scale, *_strided(normed))

    def row_l2norm(self, stream: Tensor, norms: Tensor) -> None:
        self._call("row_l2norm", _dtype(stream), *_shape(stream), *_strided(stream), *_strided(norms))

    def streams_l2norm(self, streams: Sequence[Tensor], norms: Tensor) -> None:
        """``norms`` is 2-D with any strides, a column for each stream."""
        count = len(streams)
        pointers = (ctypes.c_void_p * count)(*(stream.data_ptr() for stream in streams))
        strides = (ctypes.c_int64 * count)(*(stream.stride(0) for stream in streams))
        table = (*_strided(norms), ctypes.c_int64(norms.stride(1)))
        shape = (*_shape(streams[0]), ctypes.c_int64(count))
        self._call("streams_l2norm", _dtype(streams[0]), *shape, pointers, strides, *table)

    def void_mask(self, norms: Tensor, executed: Tensor | None, alpha: float, active: Tensor) -> None:
        tables = (*_strided(norms), *_strided(executed), ctypes.c_float(alpha), *_strided(active))
        self._call("void_mask", *_shape(active), *tables)

    def exit_select(self, kept: Tensor, stream: Tensor, norms: Tensor, layer: int, alpha: float) -> None:
        rule = (*_strided(norms), ctypes.c_int64(layer), ctypes.c_float(alpha))
        self._call("exit_select", _dtype(kept), *_shape(kept), *_strided(kept), *_strided(stream), *rule)

    def keep_rows(self, residual: Tensor, update: Tensor, on: Tensor, out: Tensor) -> None:
        rows = (tensor for row in (residual, update, on, out) for tensor in _strided(row))
        self._call("keep_rows", _dtype(residual), *_shape(residual), *rows)

    def compact(self, on: Tensor, index: Tensor, inverse: Tensor, count: Tensor) -> None:
        """``index`` and ``inverse`` contiguous."""
        written = (_pointer(index), _pointer(inverse), _pointer(count))
        self._call("compact", ctypes.c_int64(on.shape[0]), *_strided(on), *written)

    def gather_rows(self, stream: Tensor, index: Tensor, count: Tensor, out: Tensor) -> None:
        """As many rows as ``out`` has are the capacity."""
        chosen = (*_strided(index), _pointer(count), ctypes.c_int64(out.shape[0]))
        self._call("gather_rows", _dtype(stream), *_shape(stream), *_strided(stream), *chosen, *_strided(out))

    def scatter_rows(self, stream: Tensor, rows: Tensor, index: Tensor, count: Tensor) -> None:
        chosen = (*_strided(index), _pointer(count), ctypes.c_int64(rows.shape[0]))
        self._call("scatter_rows", _dtype(stream), *_shape(stream), *_strided(stream), *_strided(rows), *chosen)

    def rule(self, norms: Tensor, executed: Tensor, alpha: float) -> Tensor:
        """csrc/rule.h as the host compiles it, over one history: float32 [L + 1], bool [L] -> bool [L]."""
        active = torch.empty_like(executed)
        pointers = (_pointer(norms), _pointer(executed), ctypes.c_float(alpha), _pointer(active))
        self.library.void_shim_rule(ctypes.c_int64(executed.numel()), *pointers)
        return active

    def faulty(self, fault: int) -> float:
        """Runs one of the kernels that are wrong on purpose; what it wrote, 0.0 if nothing."""
        out = torch.zeros(1)
        self._call("faulty", ctypes.c_int(fault), _pointer(out))
        return float(out[0])

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, f"void_shim_{name}")(*arguments)
        if code:
            reason = self.library.void_shim_error().decode() if code < 0 else f"launch refused with cudaError {code}"
            raise RuntimeError(f"{name}: {reason}")


def _modes(modes: Modes | None) -> object:
    return None if modes is None else ctypes.byref(modes)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _strided(tensor: Tensor | None) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return _pointer(tensor), ctypes.c_int64(0 if tensor is None else tensor.stride(0))


def _dtype(rows: Tensor) -> ctypes.c_int:
    return ctypes.c_int(DTYPES[rows.dtype])


def _shape(rows: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(rows.shape[0]), ctypes.c_int64(rows.shape[1])


def _add(
    residual: Tensor, update: Tensor, out: Tensor, norms: Tensor | None, updates: Tensor | None
) -> Sequence[object]:
    pointers = (tensor for row in (residual, update, out, norms, updates) for tensor in _strided(row))
    return (*_shape(residual), *pointers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CUDA kernels for the CPU and print the library's path.")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    print(build(parser.parse_args().sanitize))


if __name__ == "__main__":
    main()
