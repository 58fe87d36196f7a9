"""add_rms_norm.cuh: add_l2norm to the bit; Hugging Face's RMSNorm of the stored stream, but for a rounding's flip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from void_ext.testing import assert_bits_equal, assert_close, assert_ulp_close, tolerance

EPS = 1e-5
NAMES = ("h", "normed", "norms", "updates")


def run(shim, place, residual, update, weight, layouts=("contiguous",) * 5, updates=True, eps=EPS):
    """h, normed, norms, change. Layouts of residual, update, h, weight, normed."""
    count, width = residual.shape
    out, normed = (place.output(count, width, residual.dtype, layouts[i]) for i in (2, 4))
    norms, change = place.column(count), place.column(count, stride=1)
    inputs = place.rows(residual, layouts[0]), place.rows(update, layouts[1])
    weights = place.rows(weight[None], layouts[3])[0]
    shim.add_rms_norm(*inputs, weights, eps, out.view, normed.view, norms.view, change.view if updates else None)
    for name, output in zip(NAMES, (out, normed, norms, change), strict=True):
        output.check(name)
    if not updates:
        change.untouched("updates")
    return tuple(output.view.clone() for output in (out, normed, norms, change))


def truth(h: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """LlamaRMSNorm with everything but its two roundings in float64."""
    wide = h.double()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)
    return (weight.float() * scaled.to(h.dtype).float()).to(h.dtype)


def check_normed(normed: Tensor, h: Tensor, weight: Tensor, eps: float = EPS) -> None:
    expected = truth(h, weight, eps)
    assert_close(normed, expected.double(), tolerance("rms_norm", h.dtype, h.shape[1]), "normed")
    if h.dtype != torch.float32:
        # A scale off by 1e-7 flips the rounding of about one element in 10^5 (bfloat16) or 10^4 (float16); in a small
        # tensor a few of them may meet.
        share = 5e-4 + 4 / max(normed.numel(), 1)
        assert_ulp_close(normed, expected, "normed", max_ulp=2, max_share=share)


def test_without_a_table_of_norms(shim, place, values, dtype, layout, width):
    residual, update, weight = values(2, width, dtype), values(2, width, dtype, seed=1), values(1, width, dtype)[0]
    _, expected, _, expected_change = run(shim, place, residual, update, weight, (layout,) * 5)
    inputs = place.rows(residual, layout), place.rows(update, layout)
    weights = place.rows(weight[None], layout)[0]
    out, normed = (place.output(2, width, dtype, layout) for _ in range(2))
    for change in (None, place.column(2, stride=1)):
        given = None if change is None else change.view
        shim.add_rms_norm(*inputs, weights, EPS, out.view, normed.view, None, given)
        out.check("h")
        normed.check("normed")
        assert_bits_equal(normed.view.clone(), expected, "normed")
    assert_bits_equal(change.view.clone(), expected_change, "updates")


@pytest.mark.parametrize("updates", [False, True], ids=["plain", "updates"])
def test_widths_and_layouts(shim, place, values, dtype, layout, width, updates):
    count = 5 if width < 3000 else 2
    residual, update = values(count, width, dtype), values(count, width, dtype, seed=1, scale=0.3)
    weight = values(1, width, dtype, seed=2)[0]
    h, normed, norms, change = run(shim, place, residual, update, weight, (layout,) * 5, updates)
    added = place.output(count, width, dtype, layout)
    added_norms, added_change = place.column(count), place.column(count)
    shim.add_l2norm(residual, update, added.view, added_norms.view, added_change.view)
    assert_bits_equal(h, torch.add(residual, update), "h")
    assert_bits_equal(norms, added_norms.view.clone(), "norms")
    if updates:
        assert_bits_equal(change, added_change.view.clone(), "updates")
    check_normed(normed, h, weight)


@pytest.mark.parametrize("operand", range(5), ids=["residual", "update", "out", "weight", "normed"])
def test_one_operand_off_the_grid(shim, place, values, dtype, operand):
    residual, update, weight = values(3, 1024, dtype), values(3, 1024, dtype, seed=1), values(1, 1024, dtype, seed=2)[0]
    aligned = run(shim, place, residual, update, weight)
    layouts = tuple("shifted" if i == operand else "contiguous" for i in range(5))
    for name, left, right in zip(NAMES, run(shim, place, residual, update, weight, layouts), aligned, strict=True):
        assert_bits_equal(left, right, name)


@pytest.mark.parametrize("size", [0, 64, 577, 2304])
def test_a_row_has_the_same_bits_anywhere(shim, place, values, dtype, size):
    residual, update, weight = (
        values(33, size, dtype),
        values(33, size, dtype, seed=1),
        values(1, size, dtype, seed=2)[0],
    )
    together = run(shim, place, residual, update, weight)
    alone = [run(shim, place, residual[i : i + 1], update[i : i + 1], weight) for i in range(33)]
    runs = {"alone": tuple(torch.cat(parts) for parts in zip(*alone, strict=True))}
    for limit in (1, 2):
        shim.configure(grid_limit=limit, last_warp_first=limit == 2)
        runs[f"{limit} blocks"] = run(shim, place, residual, update, weight)
    for how, result in runs.items():
        for name, left, right in zip(NAMES, result, together, strict=True):
            assert_bits_equal(left, right, f"{name}, {how}")


@pytest.mark.parametrize("size", [16384, 16384 + 8, 40000])
def test_rows_wider_than_the_registers_hold(shim, place, values, size):
    """The last width held in registers, the first that is not, and more than one round of the loop."""
    residual, update = values(2, size, torch.bfloat16), values(2, size, torch.bfloat16, seed=1)
    weight = values(1, size, torch.bfloat16, seed=2)[0]
    shim.configure(grid_limit=1)
    result = run(shim, place, residual, update, weight)
    check_normed(result[1], result[0], weight)
    shifted = run(shim, place, residual, update, weight, ("shifted",) * 5)
    for name, left, right in zip(NAMES, shifted, result, strict=True):
        assert_bits_equal(left, right, name)


@pytest.mark.parametrize("size", [16, 577])
def test_special_values(shim, place, special_rows, dtype, layout, size):
    residual, update = special_rows(dtype, size)
    weight = torch.linspace(-2, 2, size).to(dtype)
    h, normed, _, _ = run(shim, place, residual, update, weight, (layout,) * 5)
    expected = truth(h, weight)
    if dtype != torch.float16:  # their squares overflow float32, as in Hugging Face's own: rsqrt(inf) = 0
        huge = (h.float().abs() > 1e19).any(dim=1) & h.isfinite().all(dim=1)
        expected[huge] = h[huge] * 0 * weight
    assert_close(normed, expected.double(), tolerance("rms_norm", dtype, size), "normed")


def test_zero_rows_and_eps(shim, place, dtype):
    """Rows of zeros give zeros for every eps; eps = 0 makes them 0 * inf, as it does in torch."""
    zeros, weight = torch.zeros(3, 96, dtype=dtype), torch.ones(96, dtype=dtype)
    _, normed, norms, _ = run(shim, place, zeros, zeros, weight)
    assert_bits_equal(normed, zeros, "normed")
    assert_bits_equal(norms, torch.zeros(3), "norms")
    _, normed, _, _ = run(shim, place, zeros, zeros, weight, eps=0.0)
    assert bool(normed.isnan().all())
