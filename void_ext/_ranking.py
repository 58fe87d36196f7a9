"""Which layers hardly changed the stream, as torch ops alone: nothing in this file waits for the device.

For a token with norms n_0 … n_L and update norms u_l = ||h_{l+1} - h_l||, a layer's signal is

- ``"delta"``: 1 if it was a void, else 0;
- ``"abs_delta"``: ``|n_{l+1} - n_l|``;
- ``"relative_update"``: ``u_l / n_l``;
- ``"cosine"``: ``1 - cos(h_l, h_{l+1}) = (u_l^2 - (n_{l+1} - n_l)^2) / (2 n_l n_{l+1})``, ShortGPT's block influence.

Only tokens are counted for which the layer ran. Sums are float64. "Units" are layers, or their halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from void_ext import ops
from void_ext._selection import Criterion


@dataclass(frozen=True)
class Evidence:
    """Sums over the tokens of a row, each ``[rows, units]`` float64."""

    signal: Tensor
    change: Tensor  # of |delta|: among equals the one that changed the norm least goes first
    count: Tensor

    def pooled(self) -> Evidence:
        """All rows taken together: ``[1, units]``."""
        return Evidence(*(part.sum(0, keepdim=True) for part in (self.signal, self.change, self.count)))

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.signal + other.signal, self.change + other.change, self.count + other.count)


def values(signal: str, norms: Tensor, updates: Tensor | None = None) -> Tensor:
    """What each unit's signal says of each token, ``[..., units]`` float64; ``"delta"``: the signed delta itself."""
    before, after = norms[..., :-1].double(), norms[..., 1:].double()
    change = after - before
    if signal == "delta":
        return change
    if signal == "abs_delta":
        return change.abs()
    assert updates is not None
    wide = updates.double()
    if signal == "relative_update":
        return wide / before
    # u^2 - gap^2 as a product: the textbook form takes two nearly equal squares from each other.
    return (wide - change.abs()) * (wide + change.abs()) / (2 * before * after)


def gather(
    signal: str, norms: Tensor, judged: Tensor, voids: Tensor | None = None, updates: Tensor | None = None
) -> Evidence:
    """Sum a signal over tokens: norms ``[rows, T, units + 1]``, the other tables ``[rows, T, units]``.

    ``voids`` is needed for ``"delta"``, ``updates`` for ``"relative_update"`` and ``"cosine"``.
    """
    change = (norms[..., 1:].double() - norms[..., :-1].double()).abs()
    if signal == "delta":
        assert voids is not None
        value = voids.double()
    else:
        value = values(signal, norms, updates)
    # Chosen, not multiplied: a padded position may hold inf or NaN.
    return Evidence(
        torch.where(judged, value, 0.0).sum(1), torch.where(judged, change, 0.0).sum(1), judged.double().sum(1)
    )


def choose(found: Evidence, voids: bool, most: int | None, least: int, protected: Sequence[int]) -> Tensor:
    """Units to skip: ``[rows, units]`` bool.

    Units are ranked by their mean signal (``voids``: by their share of voids, the greatest first), then by mean
    ``|delta|``, then by index. Taken are, in this order: with ``voids`` those void in more than half of the tokens, or
    under a limit those void at all; without, every one; at most ``most``; and at least ``least`` whatever they are.
    Never a protected unit or one that no token tells about; and where a norm is not finite, which is active by the
    rule, its tokens' voids alone can have a unit taken.
    """
    mean, change = found.signal / found.count, found.change / found.count
    finite = torch.isfinite(change)
    eligible = found.count > 0
    for unit in protected:
        eligible.select(1, unit).fill_(False)
    if voids:
        wanted = eligible & (mean > (0.5 if most is None else 0.0))
    else:
        eligible &= finite & torch.isfinite(mean)
        wanted = eligible
    # Two stable sorts, the less important key first.
    order = torch.where(finite, change, torch.inf).argsort(dim=1, stable=True)
    key = torch.where(eligible, -mean if voids else mean, torch.inf)
    order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    if most is not None:
        wanted = wanted & (rank < most)
    return wanted | (eligible & finite & (rank < least))


def skip_table(
    criterion: Criterion,
    granularity: str,
    norms: Tensor,
    real: Tensor,
    executed: Tensor,
    updates: Tensor | None = None,
) -> Tensor:
    """Layers to skip: ``[rows, layers]`` bool, one row alone with granularity ``"batch"``.

    Args:
        norms: ``[rows, T, layers + 1]`` float32; ``updates``, for the signals that need them, a column less.
        real: ``[rows, T]`` bool, the tokens that count. ``executed``: ``[rows, T, layers]`` bool, the layers that ran.
        granularity: ``"token"`` judges each token and takes a layer's share of voids (or its mean signal);
            ``"sequence"`` and ``"batch"`` first take the norms of a row's tokens, or of all, together: the root of the
            sum of squares over those tokens for which every layer ran.
    """
    layers = norms.shape[-1] - 1
    if granularity != "token":
        dense = real & executed.all(-1)
        norms = _pool(norms, dense, granularity)
        updates = None if updates is None else _pool(updates, dense, granularity)
        told = dense.any(1) if granularity == "sequence" else dense.any().view(1)
        real = told[:, None]
        executed = torch.ones_like(real)[..., None].expand(-1, -1, layers)
    voids = None
    if criterion.signal == "delta":
        active = ops.void_mask(norms.flatten(0, 1), criterion.alpha, executed.flatten(0, 1).contiguous())
        voids = ~active.view(executed.shape)
    found = gather(criterion.signal, norms, real[..., None] & executed, voids, updates)
    most, least = criterion.limits(layers)
    return choose(found, voids is not None, most, least, criterion.protected(layers))


def _pool(table: Tensor, real: Tensor, granularity: str) -> Tensor:
    """The norm over several tokens, ``[rows or 1, 1, columns]`` float32: the root of the sum of their squared norms."""
    squares = torch.where(real[..., None], table.double().square(), 0.0)
    over = (1,) if granularity == "sequence" else (0, 1)
    return squares.sum(over, keepdim=True).sqrt().float()
