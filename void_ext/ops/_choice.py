"""What add_l2norm and add_rms_norm take beyond a plain sum: chosen rows, a verdict, the caller's tensors."""

from __future__ import annotations

from torch import Tensor


def chosen(*options: Tensor | float | None) -> bool:
    """Whether any of them was given."""
    return any(option is not None for option in options)


def verdict_alpha(op: str, alpha: float | None, active: Tensor | None, kept: Tensor | None) -> float:
    """``alpha`` where a verdict is asked for. Raises ValueError where one of the two is missing."""
    wanted = active is not None or kept is not None
    if wanted and alpha is None:
        raise ValueError(f"void_ext::{op}: alpha: expected a number beside active or kept, got None")
    if alpha is not None and not wanted:
        raise ValueError(f"void_ext::{op}: alpha: expected active or kept beside it, which its verdict goes to")
    return 0.0 if alpha is None else alpha
