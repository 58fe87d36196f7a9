"""keep_rows.cuh: torch.add to the bit where on, the residual's bits elsewhere, and update not read there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from void_ext.testing import assert_bits_equal


def run(shim, place, residual: Tensor, update: Tensor, on: Tensor, layouts=("contiguous",) * 3) -> Tensor:
    out = place.output(*residual.shape, residual.dtype, layouts[2])
    flags = place.rows(on.to(torch.int8)[:, None], "odd").view(torch.bool)
    shim.keep_rows(place.rows(residual, layouts[0]), place.rows(update, layouts[1]), flags, out.view)
    out.check("out")
    return out.view.clone()


def some(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5


def truth(residual: Tensor, update: Tensor, on: Tensor) -> Tensor:
    return torch.where(on[:, None], torch.add(residual, update), residual)


def test_widths_and_layouts(shim, place, values, dtype, layout, width):
    residual, update, on = values(9, width, dtype), values(9, width, dtype, seed=1), some(9)
    assert 0 < int(on.sum()) < 9
    expected = truth(residual, update, on)
    kinds = ((layout,) * 3, *(tuple(layout if i == k else "contiguous" for i in range(3)) for k in range(3)))
    for layouts in kinds:
        assert_bits_equal(run(shim, place, residual, update, on, layouts), expected, f"{layouts}")


@pytest.mark.parametrize("count", [0, 1, 33])
@pytest.mark.parametrize("size", [0, 1, 72, 577, 2304])
def test_row_counts(shim, place, values, dtype, count, size):
    residual, update, on = values(count, size, dtype), values(count, size, dtype, seed=1), some(count)
    expected = truth(residual, update, on)
    assert_bits_equal(run(shim, place, residual, update, on), expected, "h")
    shim.configure(grid_limit=1, last_warp_first=True)
    assert_bits_equal(run(shim, place, residual, update, on), expected, "h, one block")


@pytest.mark.parametrize("size", [72, 577])
def test_rows_that_are_off_are_not_read(shim, place, values, dtype, size):
    """Their update lies behind the end of its memory, which the sanitizers see; NaN stands for it without them."""
    residual, update = values(9, size, dtype), values(4, size, dtype, seed=1)
    on = torch.arange(9) < 4
    out = place.output(9, size, dtype)
    shim.keep_rows(residual, update, on, out.view)
    out.check("out")
    expected = torch.cat([torch.add(residual[:4], update), residual[4:]])
    assert_bits_equal(out.view.clone(), expected, "h")
    dirty = torch.full_like(residual, torch.nan)
    dirty[:4] = update
    assert_bits_equal(run(shim, place, residual, dirty, on), expected, "h, NaN where off")


@pytest.mark.parametrize("size", [16, 577])
def test_special_values(shim, place, special_rows, dtype, layout, size):
    residual, update = special_rows(dtype, size)
    on = torch.ones(len(residual), dtype=torch.bool)
    added = run(shim, place, residual, update, on, (layout,) * 3)
    assert_bits_equal(added, torch.add(residual, update), "all on", any_nan=True)
    assert_bits_equal(run(shim, place, residual, update, ~on, (layout,) * 3), residual, "all off")


@pytest.mark.parametrize("dtype16", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_16_bit_pattern(shim, place, values, dtype16):
    residual = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype16).reshape(16, 4096)
    on = torch.ones(16, dtype=torch.bool)
    for scale in (0.0, 1e-2, 1e2):
        update = values(16, 4096, dtype16, scale=scale)
        assert_bits_equal(run(shim, place, residual, update, on), torch.add(residual, update), "on", any_nan=True)
    assert_bits_equal(run(shim, place, residual, residual, ~on), residual, "off")
