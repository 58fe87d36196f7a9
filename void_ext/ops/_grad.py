"""The ops have no autograd formula; the wrappers refuse to lose a gradient in silence."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """Raises RuntimeError where grad mode is on and a tensor requires grad, naming it."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"void_ext::{op}: {name}: expected a tensor that requires no grad, got one that does in grad mode; "
                "the op has no derivative: call it under torch.no_grad(), or pass a detached tensor"
            )
