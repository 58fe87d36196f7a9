"""row_l2norm.cuh: against float64, and the bits that add_l2norm finds for the same rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from void_ext.testing import assert_bits_equal, assert_close


def run(shim, place, stream: Tensor, layout="contiguous", stride=3) -> Tensor:
    norms = place.column(stream.shape[0], stride)
    shim.row_l2norm(place.rows(stream, layout), norms.view)
    norms.check("norms")
    return norms.view.clone()


def test_widths_and_layouts(shim, place, values, norm_tolerance, dtype, layout, width):
    count = 7 if width < 3000 else 2
    stream = values(count, width, dtype, scale=3.0)
    norms = run(shim, place, stream, layout)
    assert_close(norms, stream.double().norm(dim=1), norm_tolerance, "norms")
    added = place.column(count)
    shim.add_l2norm(stream, torch.zeros_like(stream), torch.empty_like(stream), added.view)
    assert_bits_equal(norms, added.view.clone(), "norms of both ops")


@pytest.mark.parametrize("count", [0, 1, 7, 33])
@pytest.mark.parametrize("size", [0, 1, 577, 2304])
def test_a_row_has_the_same_bits_anywhere(shim, place, values, norm_tolerance, dtype, count, size):
    stream = values(count, size, dtype)
    together = run(shim, place, stream)
    assert_close(together, stream.double().norm(dim=1), norm_tolerance, "norms")
    for row in range(count):
        assert_bits_equal(
            run(shim, place, stream[row : row + 1], stride=1), together[row : row + 1], f"row {row} alone"
        )
    for limit in (1, 2):
        shim.configure(grid_limit=limit, last_warp_first=limit == 2)
        assert_bits_equal(run(shim, place, stream), together, f"{limit} blocks")


def test_special_values(shim, place, special_rows, norm_tolerance, dtype, layout):
    stream, _ = special_rows(dtype, 577)
    truth = stream.double().norm(dim=1)
    norms = run(shim, place, stream, layout)
    assert_close(norms, torch.where(truth > 1e30, torch.inf, truth), norm_tolerance, "norms")
