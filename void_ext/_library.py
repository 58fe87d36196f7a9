"""Loads the native libraries once: the op library into torch, and the host module that knows what the build is."""

from __future__ import annotations

import threading
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from void_ext import _fake
from void_ext.errors import LibraryError

_OPS = Path(__file__).with_name("_ops.abi3.so")
_HOW_TO_BUILD = (
    "Build it from the project's source directory, with the torch it shall work with installed: "
    "pip install --no-build-isolation --no-deps -e . (or `make build`)"
)
_lock = threading.Lock()
_loaded = threading.Event()


def load() -> None:
    """Makes ``torch.ops.void_ext`` usable: ops, kernels and fake kernels are registered. Later calls do nothing.

    Raises:
        LibraryError: the libraries are not built, do not load into this torch, or VOID_EXT_CPU_ISA names an instruction
            set that this build or this CPU lacks. The message says what to do.
    """
    if _loaded.is_set():
        return
    with _lock:
        if _loaded.is_set():
            return
        build_info()
        if not _OPS.is_file():
            raise LibraryError(f"void_ext's op library is not built: no {_OPS.name} in {_OPS.parent}. {_HOW_TO_BUILD}")
        try:
            torch.ops.load_library(str(_OPS))  # type: ignore[no-untyped-call]
        except OSError as error:
            raise LibraryError(
                f"void_ext's op library does not load into torch {torch.__version__}, "
                f"it needs torch {_build()['torch_target']} or later: {error}. {_HOW_TO_BUILD}"
            ) from error
        _fake.register()
        _loaded.set()


def build_info() -> dict[str, Any]:
    """What this build is, from the host module; the op library need not load for it.

    Returns:
        ``version``, ``torch_target`` (oldest torch it works with), ``torch_built`` (built against), ``compiler``,
        ``cuda`` (bool), ``cuda_version`` ("" without), ``cuda_arches`` (like ``["80", "120+PTX"]``), ``cuda_reason``
        (why CUDA was or was not built), ``cpu_isas`` (compiled in), ``cpu_isa`` (in use; VOID_EXT_CPU_ISA chooses).
    Raises:
        LibraryError: as :func:`load`.
    """
    return dict(_build())


@cache
def _build() -> dict[str, Any]:
    try:
        host = import_module("void_ext._host")
    except ImportError as error:
        raise LibraryError(f"void_ext's native part is not built for this Python: {error}. {_HOW_TO_BUILD}") from error
    try:
        info: dict[str, Any] = host.build_info()
    except ValueError as error:
        raise LibraryError(str(error)) from error
    return info
