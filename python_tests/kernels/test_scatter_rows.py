"""scatter_rows.cuh: the rows below the count copied to the bit to where their index says, nothing else touched."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from void_ext.testing import assert_bits_equal


def run(shim, place, stream: Tensor, rows: Tensor, index: list[int], count: int, layouts=("contiguous",) * 2) -> None:
    output = place.output(*stream.shape, stream.dtype, layouts[0])
    output.view.copy_(stream)
    entries = place.rows(torch.tensor(index, dtype=torch.int64)[:, None], "odd")[:, 0]
    shim.scatter_rows(output.view, place.rows(rows, layouts[1]), entries, torch.tensor([count]))
    output.check("stream")
    expected = stream.clone()
    for i in range(max(0, min(count, len(rows)))):
        if 0 <= index[i] < len(stream):
            expected[index[i]] = rows[i]
    assert_bits_equal(output.view.clone(), expected, "stream")


def test_widths_and_layouts(shim, place, values, dtype, layout, width):
    stream, rows = values(9, width, dtype), values(5, width, dtype, seed=1)
    for layouts in ((layout, layout), (layout, "contiguous"), ("contiguous", layout)):
        run(shim, place, stream, rows, [8, 0, 3, 4, 7], 5, layouts)


@pytest.mark.parametrize("size", [0, 1, 72, 577, 2304])
@pytest.mark.parametrize("count", [-1, 0, 1, 4, 9, 10, 2**40])
def test_counts(shim, place, values, dtype, size, count):
    stream = values(9, size, dtype)
    order = [4, 3, 8, 0, 1, 2, 7, 6, 5]
    below = max(0, min(count, 9))
    for capacity in (0, 1, 5, 9):
        index, rows = order[:below] + [2**50] * (9 - below), values(capacity, size, dtype, seed=1)
        run(shim, place, stream, rows, index, count)
        run(shim, place, stream, rows, order, count)
        shim.configure(grid_limit=1, last_warp_first=True)
        run(shim, place, stream, rows, index, count)
        shim.configure()


@pytest.mark.parametrize("size", [72, 577])
def test_rows_behind_the_count_are_not_read(shim, place, values, dtype, size):
    """They lie behind the end of their memory, which the sanitizers see."""
    stream, rows = values(9, size, dtype), values(2, size, dtype, seed=1)

    class Claim:
        """Rows that say they are nine, with memory for two."""

        shape, dtype = (9, size), rows.dtype

        def data_ptr(self) -> int:
            return rows.data_ptr()

        def stride(self, axis: int) -> int:
            return rows.stride(axis)

    expected = stream.clone()
    expected[[5, 1]] = rows
    index = torch.tensor([5, 1] + [0] * 7)
    shim.scatter_rows(stream, Claim(), index, torch.tensor([2]))
    assert_bits_equal(stream, expected, "stream")


def test_an_index_that_is_no_row_is_skipped(shim, place, values, dtype):
    stream, rows = values(4, 72, dtype), values(4, 72, dtype, seed=1)
    run(shim, place, stream, rows, [3, -1, 0, 4], 4)
    run(shim, place, stream, rows, [2**40, -(2**40), 2, 1], 4)


def test_copies_bits(shim, place, dtype):
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    rows = torch.arange(-512, 512, dtype=bits).view(dtype).reshape(2, -1)  # negative numbers are NaN with payloads
    run(shim, place, torch.zeros_like(rows), rows, [1, 0], 2)


def test_takes_back_what_gather_rows_packed(shim, place, values, dtype):
    stream = values(9, 577, dtype)
    index, count = torch.tensor([1, 4, 5, 8]), torch.tensor([4])
    packed, target = torch.zeros(4, 577, dtype=dtype), torch.zeros_like(stream)
    shim.gather_rows(stream, index, count, packed)
    shim.scatter_rows(target, packed, index, count)
    on = torch.zeros(9, 1, dtype=torch.bool)
    on[index] = True
    assert_bits_equal(target, torch.where(on, stream, 0.0).to(dtype), "stream")


def test_offsets_beyond_2_to_the_31(shim):
    """Three rows 2**30 + 8 elements apart, in memory that is only reserved."""
    stride, width, noreserve = 2**30 + 8, 24, 0x4000
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
        memory = mmap.mmap(-1, (2 * stride + width) * 2, flags=flags)
    except OSError as error:
        pytest.skip(f"cannot reserve 4 GiB of addresses: {error}")
    stream = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, width), (stride, 1))
    rows, packed = torch.arange(2.0 * width).view(2, width).to(torch.bfloat16), torch.zeros(2, width).bfloat16()
    index, count = torch.tensor([2, 1]), torch.tensor([2])
    shim.scatter_rows(stream, rows, index, count)
    assert_bits_equal(stream[[2, 1]], rows, "stream")
    shim.gather_rows(stream, index, count, packed)
    assert_bits_equal(packed, rows, "packed")
    kept = torch.zeros(3, width, dtype=torch.bfloat16)
    shim.keep_rows(stream, stream, torch.tensor([False, True, False]), kept)
    assert_bits_equal(kept, torch.stack([stream[0], 2 * stream[1], stream[2]]), "kept")
