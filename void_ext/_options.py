"""Checks of the values users pass by name; each message says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

MODES = ("trace", "exit")
FUSES = ("add", "norm")
GRANULARITIES = ("token", "sequence", "batch")


def check_alpha(alpha: float) -> float:
    """``alpha`` as a float; finite and >= 0."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha: expected a number >= 0, got {type(alpha).__name__} {alpha!r}")
    if not math.isfinite(alpha) or alpha < 0:
        raise ValueError(f"alpha: expected a finite number >= 0, got {alpha}")
    return float(alpha)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """``value``, if it is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")
    return value


def check_flag(name: str, value: bool) -> bool:
    """``value``, if it is a bool: ``reference_quirks="no"`` should not mean yes."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__} {value!r}")
    return value
