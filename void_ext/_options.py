"""Checks of the values users pass by name; each message says what was expected and what came."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path

LARGEST = 3.4028234663852886e38  # of float32, in which thresholds are computed

MODES = ("trace", "exit", "skip")
FUSES = ("add", "norm")
GRANULARITIES = ("token", "sequence", "batch")


def check_alpha(alpha: float) -> float:
    """``alpha`` as a float; finite in float32 and >= 0."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha: expected a number >= 0, got {type(alpha).__name__} {alpha!r}")
    if not 0 <= alpha < math.inf:  # also False for NaN
        raise ValueError(f"alpha: expected a finite number >= 0, got {alpha}")
    if alpha > LARGEST:
        raise ValueError(f"alpha: expected at most {LARGEST}, the largest number of float32, got {alpha}")
    return float(alpha)


def alpha_text(alpha: float) -> str:
    """``0.8``; so many digits as tell it from every other alpha."""
    short = format(alpha, "g")
    return short if float(short) == alpha else repr(alpha)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """``value``, if it is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")
    return value


def check_path(name: str, value: str | os.PathLike[str]) -> Path:
    """``value`` as a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            f"{name}: expected the name of a file (str or os.PathLike), got {type(value).__name__} {value!r}"
        )
    return Path(value)


def check_whole(name: str, value: int) -> int:
    """``value`` as an int, from a tensor or of numpy too."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name}: expected a whole number, got {type(value).__name__} {value!r}")


def has_half_pair(text: str) -> bool:
    """Whether half of a surrogate pair stands in it, as in file names that are no UTF-8: no encoder takes it."""
    return any("\ud800" <= mark <= "\udfff" for mark in text)


def check_flag(name: str, value: bool) -> bool:
    """``value``, if it is a bool: ``reference_quirks="no"`` should not mean yes."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__} {value!r}")
    return value
