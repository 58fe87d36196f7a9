from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from void_ext import ops, reference
from void_ext.testing import assert_bits_equal

COMPACT = torch.ops.void_ext.compact.default
# Around a warp's word, a warp's part of a tile, and the tile of the CUDA kernel's largest block.
SIZES = [0, 1, 2, 31, 32, 33, 255, 256, 257, 4096, 8191, 8192, 8193, 20_001]


def flags(rows: int, device: torch.device, share: float = 0.5) -> Tensor:
    return (torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < share).to(device)


def check(on: Tensor) -> None:
    index, inverse, count = ops.compact(on)
    for name, got, expected in zip(
        ("index", "inverse", "count"), (index, inverse, count), reference.compact(on), strict=True
    ):
        assert got.is_contiguous()
        assert_bits_equal(got, expected, name)
    rows = on.nonzero()[:, 0]
    assert count.tolist() == [len(rows)]
    assert index.tolist() == rows.tolist() + [-1] * (len(on) - len(rows))
    assert_bits_equal(inverse[rows], torch.arange(len(rows), device=on.device), "inverse")
    assert bool((inverse[~on] == -1).all())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("rows", SIZES)
def test_matches_reference(device, rows, share) -> None:
    check(flags(rows, device, share))


@pytest.mark.parametrize("rows", [1, 33, 8193])
def test_flags_at_any_stride(device, rows) -> None:
    table = flags(rows * 3, device).view(rows, 3)
    for column in range(3):
        check(table[:, column])
    check(table[0, :1].expand(rows))
    check(flags(rows + 1, device)[1:])


def test_one_row_anywhere(device) -> None:
    for row in (0, 1, 31, 32, 255, 256, 8191, 8192, 9999):
        on = torch.zeros(10_000, dtype=torch.bool, device=device)
        on[row] = True
        index, inverse, count = ops.compact(on)
        assert (index[0].item(), inverse[row].item(), count.item()) == (row, 0, 1)
        assert (index[1:] == -1).all()
        assert inverse.sum().item() == -9999


@settings(max_examples=60, deadline=None)
@given(on=st.lists(st.booleans(), max_size=300))
def test_random_flags(on: list[bool]) -> None:
    check(torch.tensor(on, dtype=torch.bool))


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_opcheck(device, rows) -> None:
    torch.library.opcheck(COMPACT, (flags(rows, device),))


def test_compiles_without_breaks(device) -> None:
    def both(norms):
        index, inverse, count = ops.compact(norms > 0)
        return index + 1, inverse, count

    norms = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(device)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(norms)
    for got, expected in zip(compiled, both(norms), strict=True):
        assert_bits_equal(got, expected)


@pytest.mark.parametrize(
    ("on", "message"),
    [
        (torch.ones(3), "on: expected bool, got float32"),
        (torch.ones(3, dtype=torch.uint8), "on: expected bool, got uint8"),
        (torch.ones(3, 2, dtype=torch.bool), "on: expected one dimension, got shape [3, 2]"),
        (torch.tensor(True), "on: expected one dimension, got shape []"),
    ],
)
def test_names_what_is_wrong(device, on, message) -> None:
    with pytest.raises(ValueError, match=re.escape(f"void_ext::compact: {message}")):
        ops.compact(on.to(device))
