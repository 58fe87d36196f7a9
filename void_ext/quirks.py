r"""What the paper's published code does differently, kept apart from what we mean (``reference_quirks=True``).

1. Layer 0 has no deltas before it; the code takes the range of the layer's own deltas over the *batch axis*, so a row's
   verdict depends on its neighbours, padding included.
2. Norms, deltas and thresholds are held in the model dtype: bfloat16 has spacing 1.0 at norm 200, so voids flip.

Source: github.com/manishemirani/void_in_language_models, as executed (transformers 4.50).
"""

from __future__ import annotations

import torch
from torch import Tensor


def void_mask(norms: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """Active layers by the paper's code: norms ``[B, T, L+1]`` float32 -> ``[B, T, L]`` bool."""
    held = norms.to(dtype)
    deltas = held[..., 1:] - held[..., :-1]
    verdicts = [layer_mask(deltas[..., : layer + 1], alpha) for layer in range(deltas.shape[-1])]
    return torch.stack(verdicts, dim=-1) if verdicts else deltas.bool()


def layer_mask(deltas: Tensor, alpha: float) -> Tensor:
    """Verdict on the last of ``deltas`` ``[B, T, layer + 1]``: ``[B, T]`` bool."""
    delta = deltas[..., -1]
    if deltas.shape[-1] == 1:
        spread = (delta.amax(0) - delta.amin(0)).expand_as(delta) if delta.numel() else delta
    else:
        before = deltas[..., :-1]
        spread = before.amax(-1) - before.amin(-1)
    return ~(delta < alpha * spread)
