"""Norms as hooks on the unpatched model take them, and a comparison with them."""

from __future__ import annotations

from typing import Any

import torch


def norms_of(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **extra: Any) -> torch.Tensor:
    """float64 norms of the residual stream ``[B, T, L+1]``, taken by hooks on the unpatched model."""
    taken: list[torch.Tensor] = []
    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda m, args: taken.append(args[0].double().norm(dim=-1)))]
    hooks += [
        layer.register_forward_hook(lambda m, args, out: taken.append(out.double().norm(dim=-1))) for layer in layers
    ]
    try:
        model(input_ids=ids, attention_mask=mask, **extra)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(taken, dim=-1)


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=0)
