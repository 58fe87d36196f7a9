"""void_mask.cuh: the recurrence written anew in torch, and csrc/rule.h as the host compiles it; all exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from void_ext.testing import assert_bits_equal

ALPHAS = [0.0, 0.2, 0.8, 1.0, 2.5]


def run(shim, place, norms: Tensor, executed: Tensor | None, alpha: float, layout="contiguous") -> Tensor:
    count, columns = norms.shape
    active = place.output(count, columns - 1, torch.bool, layout)
    ran = None
    if executed is not None:
        ran = place.rows(executed.to(torch.int8), layout).view(torch.bool)
    shim.void_mask(place.rows(norms, layout), ran, alpha, active.view)
    active.check("active")
    return active.view.clone()


def truth(norms: Tensor, executed: Tensor | None, alpha: float) -> Tensor:
    deltas = norms[:, 1:] - norms[:, :-1]
    ran = torch.ones_like(deltas, dtype=torch.bool) if executed is None else executed
    active = ran.clone()
    for layer in range(deltas.shape[1]):
        before, counts = deltas[:, :layer], ran[:, :layer]
        spread = torch.zeros(deltas.shape[0])
        if layer > 0:
            spread = before.where(counts, -torch.inf).amax(1) - before.where(counts, torch.inf).amin(1)
        threshold = torch.where(counts.any(dim=1), alpha * spread, 0.0)
        active[:, layer] &= ~(deltas[:, layer] < threshold)
    return active


def table(count: int, layers: int, seed: int = 0) -> Tensor:
    """Small multiples of 1/4, so that deltas tie with thresholds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 24, (count, layers + 1), generator=generator) / 4


@pytest.mark.parametrize("layers", [0, 1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("count", [0, 1, 33])
def test_shapes_and_layouts(shim, place, layout, layers, count):
    norms = table(count, layers)
    executed = torch.rand(count, layers, generator=torch.Generator().manual_seed(1)) < 0.7
    for alpha in ALPHAS:
        for ran in (None, executed, torch.zeros_like(executed)):
            assert_bits_equal(run(shim, place, norms, ran, alpha, layout), truth(norms, ran, alpha), f"alpha {alpha}")


@pytest.mark.parametrize("layers", [12, 40])
def test_equals_the_rule_on_the_host(shim, place, layers):
    generator = torch.Generator().manual_seed(2)
    norms = torch.rand(300, layers + 1, generator=generator).cumsum(dim=1)
    executed = torch.rand(300, layers, generator=generator) < 0.8
    for alpha in ALPHAS:
        expected = torch.stack([shim.rule(norms[i], executed[i], alpha) for i in range(300)])
        assert_bits_equal(run(shim, place, norms, executed, alpha), expected, f"alpha {alpha}")
        shim.configure(grid_limit=1, last_warp_first=True)
        assert_bits_equal(run(shim, place, norms, executed, alpha), expected, f"alpha {alpha}, one block")
        shim.configure()


def test_nan_and_infinity(shim, place):
    """A NaN is active, and so is everything after it; infinite ranges follow IEEE arithmetic."""
    norms = table(64, 40, seed=3)
    generator = torch.Generator().manual_seed(4)
    for value in (torch.nan, torch.inf, -torch.inf):
        at = torch.rand(norms.shape, generator=generator) < 0.01
        norms[at] = value
    assert bool(norms.isnan().any())
    for alpha in ALPHAS:
        assert_bits_equal(run(shim, place, norms, None, alpha), truth(norms, None, alpha), f"alpha {alpha}")


def test_ties_occur_and_are_active(shim, place):
    """delta == threshold > 0 in layer 2: active."""
    norms = torch.tensor([[0.0, 4.0, 4.0, 8.0, 8.0]])
    assert run(shim, place, norms, None, 1.0).tolist() == [[True, True, True, False]]
