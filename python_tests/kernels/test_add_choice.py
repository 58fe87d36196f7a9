"""add_l2norm.cuh and add_rms_norm.cuh for chosen rows, with a verdict on the layer; weights of other kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.hostshim import Modes
from void_ext import reference
from void_ext.testing import assert_bits_equal, assert_close, assert_ulp_close, tolerance

EPS, ALPHA, LAYER = 1e-5, 0.8, 3


@pytest.fixture
def history():
    """A table whose columns 0 … LAYER are the norms of layers before, column LAYER + 1 poisoned."""

    def make(count: int) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        table = torch.full((count, LAYER + 4), torch.nan)
        table[:, : LAYER + 1] = torch.randn(count, LAYER + 1, generator=generator).cumsum(1) + 20
        return table

    return make


def flags(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("fused", [False, True], ids=["add_l2norm", "add_rms_norm"])
def test_widths_and_layouts(shim, place, values, history, dtype, layout, width, fused):
    count = 9 if width < 3000 else 4
    residual, update, old = (values(count, width, dtype, seed=seed, scale=4.0) for seed in range(3))
    on, executed = flags(count), flags(count, LAYER, seed=1)
    update[~on] = torch.nan  # it is not to be read there
    table = history(count)
    out, normed, kept = (place.output(count, width, dtype, layout) for _ in range(3))
    kept.view.copy_(old)
    active, change = torch.ones(2 * count, dtype=torch.bool)[::2], place.column(count)
    modes = Modes(on, LAYER, executed, ALPHA, active, kept.view)
    rows = place.rows(residual, layout), place.rows(update, layout)
    if fused:
        weight = values(1, width, dtype, seed=3)[0]
        norms = table[:, LAYER + 1]
        shim.add_rms_norm(*rows, weight, EPS, out.view, normed.view, norms, change.view, modes)
        normed.check("normed")
    else:
        shim.add_l2norm(*rows, out.view, table[:, LAYER + 1], change.view, modes)
    for name, output in (("h", out), ("kept", kept), ("updates", change)):
        output.check(name)
    expected = reference.keep_rows(residual, torch.where(on[:, None], update, 0), on)
    assert_bits_equal(out.view.clone(), expected, "h")
    assert bool((change.view[~on] == 0).all())
    plain = place.column(count)
    shim.row_l2norm(expected, plain.view)
    assert_bits_equal(table[:, LAYER + 1].clone(), plain.view.clone(), "norms")
    verdict = reference.void_mask(table[:, : LAYER + 2], ALPHA, torch.cat([executed, on[:, None]], 1))[:, -1]
    assert torch.equal(active, verdict)
    assert_bits_equal(kept.view.clone(), torch.where(verdict[:, None], expected, old), "kept")
    if fused:
        alone = place.output(count, width, dtype)
        again, zero = place.column(count), torch.zeros_like(expected)
        shim.add_rms_norm(expected, zero, weight, EPS, torch.empty_like(zero), alone.view, again.view)
        assert_bits_equal(normed.view.clone(), alone.view.clone(), "normed")


@pytest.mark.parametrize("size", [40, 16384 + 8])
def test_modes_one_at_a_time(shim, place, values, history, dtype, size):
    residual, update = values(5, size, dtype), values(5, size, dtype, seed=1, scale=3.0)
    h, on = residual + update, flags(5, seed=2)
    for modes, expected in (
        (Modes(on), torch.where(on[:, None], h, residual)),
        (Modes(layer=LAYER, alpha=ALPHA, active=torch.empty(5, dtype=torch.bool)), h),
        (Modes(layer=LAYER, alpha=ALPHA, kept=residual.clone()), h),
        (Modes(), h),
    ):
        out = place.output(5, size, dtype)
        shim.add_l2norm(residual, update, out.view, history(5)[:, LAYER + 1], None, modes)
        out.check("h")
        assert_bits_equal(out.view.clone(), expected, "h")


def test_the_verdict_is_that_of_the_rule(shim, values, history):
    """Some rows active and some not, at the first layer too, whose threshold is 0."""
    residual, update, table = values(64, 24, torch.float32), values(64, 24, torch.float32, seed=1), history(64)
    residual = residual * 4
    for layer in range(LAYER + 1):
        active, norms = torch.empty(64, dtype=torch.bool), table.clone()
        modes = Modes(layer=layer, alpha=ALPHA, active=active)
        shim.add_l2norm(residual, update, torch.empty(64, 24), norms[:, layer + 1], None, modes)
        expected = reference.void_mask(norms[:, : layer + 2], ALPHA)[:, -1]
        assert torch.equal(active, expected)
        assert 0 < int(active.sum()) < 64


@pytest.mark.parametrize("zero_centered", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("wide", [False, True], ids=["same", "float32"])
def test_weights(shim, place, values, dtype, layout, width, zero_centered, wide):
    count = 5 if width < 3000 else 2
    residual, update = values(count, width, dtype), values(count, width, dtype, seed=1, scale=0.3)
    weight = values(1, width, torch.float32 if wide else dtype, seed=2)
    out, normed, norms = (
        place.output(count, width, dtype),
        place.output(count, width, dtype, layout),
        place.column(count),
    )
    rows = place.rows(residual, layout), place.rows(update, layout)
    at = place.rows(weight, layout)[0]
    shim.add_rms_norm(*rows, at, EPS, out.view, normed.view, norms.view, zero_centered=zero_centered)
    normed.check("normed")
    h = residual + update
    scaled = h.double() * torch.rsqrt(h.double().square().mean(dim=1, keepdim=True) + EPS)
    if zero_centered:
        expected = scaled * (1.0 + weight[0].float()).double()
    else:
        expected = weight[0].double() * scaled.to(dtype).double()
    expected = expected.to(dtype)
    assert_close(normed.view, expected.double(), tolerance("rms_norm", dtype, width), "normed")
    if dtype != torch.float32:
        share = 5e-4 + 4 / normed.view.numel()
        assert_ulp_close(normed.view, expected, "normed", max_ulp=2, max_share=share)


@pytest.mark.parametrize("limit", [1, 2])
def test_more_rows_than_blocks(shim, values, history, limit):
    residual, update = values(33, 2304, torch.bfloat16), values(33, 2304, torch.bfloat16, seed=1)
    results = []
    for grid in (2**31 - 1, limit):
        shim.configure(grid_limit=grid, last_warp_first=grid == 2)
        on, active, kept = flags(33), torch.empty(33, dtype=torch.bool), torch.zeros_like(residual)
        out, normed, table = torch.empty_like(residual), torch.empty_like(residual), history(33)
        modes = Modes(on, LAYER, None, ALPHA, active, kept)
        shim.add_rms_norm(residual, update, residual[0], EPS, out, normed, table[:, LAYER + 1], None, modes)
        results.append((out, normed, table[:, LAYER + 1].clone(), kept, active))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)
