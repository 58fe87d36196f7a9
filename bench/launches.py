"""Other ways to launch the adds, for comparison in one process: walking blocks, and no dependent launches."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import void_ext

#: name -> blocks for each multiprocessor (0: a block a row), whether a kernel may begin before the one ahead has ended
WAYS = {"persistent, 4 blocks": (4, 1), "persistent, 8 blocks": (8, 1), "ordinary launch": (0, 0)}


@contextmanager
def launched(way: str) -> Iterator[None]:
    """Launches inside are made this way. A captured graph keeps the way it was captured with.

    Raises AttributeError where the library was built without CUDA.
    """
    path = next(Path(void_ext.__file__).parent.glob("_ops*.so"))
    tune = ctypes.CDLL(str(path)).void_ext_tune_launches  # the library that torch has loaded already
    tune.argtypes = [ctypes.c_int64, ctypes.c_int]
    tune(*WAYS[way])
    try:
        yield
    finally:
        tune(0, 1)
