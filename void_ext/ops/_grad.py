"""The ops themselves have no autograd formula. Where one is cheap, a wrapper that is asked for a gradient adds once
more in plain torch; the others refuse to lose it in silence."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """Raises RuntimeError where grad mode is on and a tensor requires grad, naming it."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise RuntimeError(
                f"void_ext::{op}: {name}: expected a tensor that requires no grad, got one that does in grad mode; "
                "the op has no derivative: call it under torch.no_grad(), or pass a detached tensor"
            )


def wants_grad(*tensors: Tensor) -> bool:
    """Whether grad mode is on and one of them requires grad."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
