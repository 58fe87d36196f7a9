"""compact.cuh: one block, tiles of up to 8192 flags, warps in either order; all exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from void_ext import reference
from void_ext.testing import assert_bits_equal

# Around a word, a warp's part of a tile, a block of two and of all warps, two tiles.
SIZES = [0, 1, 31, 32, 33, 255, 256, 257, 511, 513, 8191, 8192, 8193, 16_500]


def run(shim, place, on: Tensor, layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor]:
    rows = len(on)
    flags = place.rows(on.to(torch.int8)[:, None], layout).view(torch.bool)
    outputs = [place.output(1, size, torch.int64) for size in (rows, rows, 1)]
    shim.compact(flags, *(output.view for output in outputs))
    for name, output in zip(("index", "inverse", "count"), outputs, strict=True):
        output.check(name)
    index, inverse, count = (output.view[0].clone() for output in outputs)
    return index, inverse, count


def check(shim, place, on: Tensor, layout: str = "contiguous") -> None:
    for name, got, expected in zip(
        ("index", "inverse", "count"), run(shim, place, on, layout), reference.compact(on), strict=True
    ):
        assert_bits_equal(got, expected, f"{name} of {len(on)} rows, {layout}")


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("rows", SIZES)
def test_sizes(shim, place, rows, share):
    on = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < share
    for last_warp_first in (False, True):
        shim.configure(last_warp_first=last_warp_first)
        check(shim, place, on)


@pytest.mark.parametrize("rows", [1, 300])
def test_flags_at_any_stride(shim, place, layout, rows):
    check(shim, place, torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < 0.5, layout)


def test_as_many_warps_as_the_rows_need(shim, place):
    for rows, threads in ((0, 32), (256, 32), (257, 64), (8192, 1024), (8193, 1024)):
        run(shim, place, torch.ones(rows, dtype=torch.bool))
        assert shim.threads_per_row == threads, rows
