"""SIGTERM as an exception, so that a long command says what it leaves behind before it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ending_with_exception() -> Iterator[None]:
    """Within it SIGTERM raises SystemExit(143), the code that a shell gives a process that ended by it.

    Python hands signals to the main thread alone; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
