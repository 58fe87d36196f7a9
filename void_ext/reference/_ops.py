"""The ops in plain torch: slow, on any device, norms accumulated in float64. What the fast ones are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def add_l2norm(
    residual: Tensor,
    update: Tensor,
    norms: Tensor,
    column: int,
    updates: Tensor | None = None,
    *,
    on: Tensor | None = None,
    alpha: float | None = None,
    executed: Tensor | None = None,
    active: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """``h = residual + update``, ``norms[i, column] = ||h_i||``, ``updates[i, column - 1] = ||h_i - residual_i||``.

    In rows that are off ``h = residual``. ``active`` takes :func:`void_mask`'s verdict on layer ``column - 1``, and
    ``kept`` the rows of ``h`` where that is active.
    """
    rows = residual.shape[:-1].numel()
    runs = torch.ones(rows, dtype=torch.bool, device=residual.device) if on is None else on.clone()
    wide = runs.reshape(*residual.shape[:-1], 1)
    h = torch.where(wide, residual + update, residual).contiguous()
    row_l2norm(h, norms, column)
    if updates is not None:
        row_l2norm(torch.where(wide, h.float() - residual.float(), 0.0), updates, column - 1)
    if alpha is not None:
        before = torch.ones(rows, column - 1, dtype=torch.bool, device=h.device) if executed is None else executed
        ran = torch.cat([before[:rows, : column - 1], runs[:, None]], 1)
        verdict = void_mask(norms[:rows, : column + 1], alpha, ran)[:, -1]
        if active is not None:
            active.copy_(verdict)
        if kept is not None:
            kept.copy_(torch.where(verdict.reshape(*residual.shape[:-1], 1), h, kept))
    return h


def add_rms_norm(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    norms: Tensor | None,
    column: int = 0,
    updates: Tensor | None = None,
    zero_centered: bool = False,
    **choice: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`add_l2norm`, and ``h``'s RMSNorm rounded in the order of transformers' LlamaRMSNorm, or GemmaRMSNorm."""
    if norms is None:
        norms = residual.new_empty(residual.shape[:-1].numel(), column + 1, dtype=torch.float32)
    h = add_l2norm(residual, update, norms, column, updates, **choice)
    return h, rms_norm(h, weight, eps, zero_centered)


def rms_norm(h: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """What :func:`add_rms_norm` makes of the sum; differentiable."""
    wide = h.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    if zero_centered:
        return (wide * (1.0 + weight.float())).to(h.dtype)
    return (weight * wide.to(h.dtype)).to(h.dtype)


def row_l2norm(stream: Tensor, norms: Tensor, column: int) -> None:
    """``norms[:rows, column] = ||stream||``, summed in float64."""
    rows = stream.shape[:-1].numel()
    squares = stream.double().square().sum(dim=-1)
    norms[:rows, column] = squares.sqrt().reshape(rows).to(norms.dtype)


def streams_l2norm(streams: Sequence[Tensor], norms: Tensor, column: int = 0) -> None:
    """:func:`row_l2norm` of each stream, into one column after the other."""
    for place, stream in enumerate(streams):
        row_l2norm(stream, norms, column + place)


def void_mask(norms: Tensor, alpha: float, executed: Tensor | None = None) -> Tensor:
    """``not (delta < alpha * (max - min of the deltas before))``; a layer that did not run is inactive and left out."""
    tokens, layers = norms.shape[0], norms.shape[1] - 1
    active = torch.zeros(tokens, layers, dtype=torch.bool, device=norms.device)
    low = torch.full((tokens,), torch.inf, device=norms.device)
    high = torch.full((tokens,), -torch.inf, device=norms.device)
    seen = torch.zeros(tokens, dtype=torch.bool, device=norms.device)
    factor = torch.tensor(alpha, dtype=torch.float32, device=norms.device)
    for layer in range(layers):
        delta = norms[:, layer + 1] - norms[:, layer]
        ran = torch.ones_like(seen) if executed is None else executed[:, layer]
        threshold = torch.where(seen, factor * (high - low), 0.0)
        active[:, layer] = ran & ~(delta < threshold)
        low = torch.where(ran, torch.minimum(low, delta), low)
        high = torch.where(ran, torch.maximum(high, delta), high)
        seen = seen | ran
    return active


def exit_select(kept: Tensor, stream: Tensor, norms: Tensor, layer: int, alpha: float) -> None:
    """``kept = stream`` in the rows whose layer ``layer`` was active."""
    rows = kept.shape[:-1].numel()
    active = void_mask(norms[:rows, : layer + 2], alpha)[:, layer]
    kept.copy_(torch.where(active.reshape(*kept.shape[:-1], 1), stream, kept))


def keep_rows(residual: Tensor, update: Tensor, on: Tensor) -> Tensor:
    """``residual + update`` in the rows that are on, ``residual`` elsewhere."""
    return torch.where(on.reshape(*residual.shape[:-1], 1), residual + update, residual).contiguous()


def compact(on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that are on, ascending, then -1; each row's place among them, or -1; their count."""
    found = on.nonzero()[:, 0]
    index, inverse = torch.full(on.shape, -1, device=on.device), torch.full(on.shape, -1, device=on.device)
    index[: len(found)] = found
    inverse[found] = torch.arange(len(found), device=on.device)
    return index, inverse, torch.tensor([len(found)], device=on.device)


def gather_rows(stream: Tensor, index: Tensor, count: Tensor, capacity: int) -> Tensor:
    """``out[i] = stream[index[i]]`` for ``i < min(count, capacity)``; rows beyond are of any value."""
    rows = min(int(count), capacity)
    out = stream.new_empty(capacity, stream.shape[-1])
    out[:rows] = stream.reshape(stream.shape[:-1].numel(), stream.shape[-1])[index[:rows]]
    return out


def scatter_rows(stream: Tensor, rows: Tensor, index: Tensor, count: Tensor) -> None:
    """``stream[index[i]] = rows[i]`` for ``i < min(count, len(rows))``."""
    number = min(int(count), len(rows))
    flat = stream.reshape(stream.shape[:-1].numel(), stream.shape[-1])
    stream.copy_(flat.index_copy(0, index[:number], rows[:number]).view(stream.shape))
