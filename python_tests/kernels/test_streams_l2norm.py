"""streams_l2norm.cuh: the bits that row_l2norm finds, wherever the streams and the table lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from void_ext.testing import assert_bits_equal

MOST = 128  # csrc/args.h: kMostStreams


def expected(shim, streams: list[Tensor]) -> Tensor:
    norms = torch.full((len(streams), streams[0].shape[0]), -7.0)
    for stream, column in zip(streams, norms, strict=True):
        shim.row_l2norm(stream, column)
    return norms.t()


def test_widths_and_layouts(shim, place, values, dtype, layout, width):
    rows = 6 if width < 3000 else 2
    streams = [place.rows(values(rows, width, dtype, seed=seed, scale=3.0), layout) for seed in range(3)]
    norms = torch.full((rows + 1, 5), -7.0)
    shim.streams_l2norm(streams, norms[:, 1:])
    assert_bits_equal(norms[:rows, 1:-1].clone(), expected(shim, streams).clone())
    assert bool((norms[rows] == -7.0).all())
    assert bool((norms[:, ::4] == -7.0).all())


@pytest.mark.parametrize("count", [1, MOST])
def test_as_many_streams_as_parameters_hold(shim, values, count):
    streams = [values(5, 66, torch.bfloat16, seed=seed) for seed in range(count)]
    norms = torch.full((5, count), -7.0)
    shim.streams_l2norm(streams, norms)
    assert_bits_equal(norms, expected(shim, streams).clone())


def test_streams_of_different_layouts_and_a_table_by_column(shim, place, values, dtype):
    layouts = ["contiguous", "padded", "shifted", "odd", "gapped"]
    for size in (576, 577):
        streams = [place.rows(values(5, size, dtype, seed=seed), layout) for seed, layout in enumerate(layouts)]
        norms = torch.full((len(streams), 5), -7.0).t()
        shim.streams_l2norm(streams, norms)
        assert_bits_equal(norms.clone(), expected(shim, streams).clone())


@pytest.mark.parametrize("limit", [1, 2])
def test_blocks_walk_over_rows(shim, place, values, dtype, limit):
    for width in (64, 577, 4096):
        streams = [values(9, width, dtype, seed=seed) for seed in range(3)]
        norms = torch.full((9, 3), -7.0)
        shim.configure(grid_limit=limit, last_warp_first=limit == 2)
        shim.streams_l2norm(streams, norms)
        assert_bits_equal(norms, expected(shim, streams).clone())


def test_more_streams_than_parameters_hold_are_refused(shim, values):
    streams = [values(2, 8, torch.float32)] * (MOST + 1)
    norms = torch.full((2, MOST + 1), -7.0)
    with pytest.raises(RuntimeError, match="launch refused"):
        shim.streams_l2norm(streams, norms)
    assert bool((norms == -7.0).all())


def test_nothing_to_do(shim):
    norms = torch.full((3, 2), -7.0)
    shim.streams_l2norm([torch.empty(0, 8)] * 2, norms)
    assert bool((norms == -7.0).all())
