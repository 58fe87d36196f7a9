"""An argument that is no tensor is refused here: of a None, torch's dispatcher and the ops' checks say only that they
failed."""

from __future__ import annotations

from torch import Tensor


def check_tensors(op: str, names: str, *tensors: Tensor) -> None:
    """Raises TypeError where an argument is no tensor, naming it. ``names``: of all of them, with blanks between.

    They are not keywords: that would be a tenth of a microsecond in each call of a public op.
    """
    for place, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"void_ext::{op}: {names.split()[place]}: expected a tensor, got {type(tensor).__name__}")
