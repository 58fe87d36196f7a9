"""gather_rows.cuh: the rows below the count copied to the bit, all others neither read nor written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from void_ext.testing import assert_bits_equal


def run(shim, place, stream: Tensor, index: list[int], count: int, capacity: int, layouts=("contiguous",) * 2) -> None:
    """Checks the rows that are to be written, and that the others are still poisoned."""
    out = place.output(capacity, stream.shape[1], stream.dtype, layouts[1])
    entries = place.rows(torch.tensor(index, dtype=torch.int64)[:, None], "odd")[:, 0]
    shim.gather_rows(place.rows(stream, layouts[0]), entries, torch.tensor([count]), out.view)
    written = [i for i in range(max(0, min(count, capacity))) if 0 <= index[i] < len(stream)]
    mine = torch.zeros(capacity, dtype=torch.bool)
    mine[written] = True
    out.inside.as_strided(out.view.shape, out.view.stride(), out.view.storage_offset())[~mine] = False
    out.check("out")
    assert_bits_equal(out.view[mine], stream[[index[i] for i in written]], f"rows {written}")


def test_widths_and_layouts(shim, place, values, dtype, layout, width):
    stream = values(9, width, dtype)
    for layouts in ((layout, layout), (layout, "contiguous"), ("contiguous", layout)):
        run(shim, place, stream, [8, 0, 3, 4, 7], 5, 5, layouts)


@pytest.mark.parametrize("size", [0, 1, 72, 577, 2304])
@pytest.mark.parametrize("count", [-1, 0, 1, 4, 9, 10, 2**40])
def test_counts_and_capacities(shim, place, values, dtype, size, count):
    """The count is read on the device: above the capacity it is cut, below nothing behind it is looked at."""
    stream = values(9, size, dtype)
    order = [4, 3, 8, 0, 1, 2, 7, 6, 5]
    below = max(0, min(count, 9))
    for capacity in (0, 1, 5, 9):
        index = order[:below] + [2**50] * (9 - below)
        run(shim, place, stream, index, count, capacity)
        run(shim, place, stream, order, count, capacity)
        shim.configure(grid_limit=1, last_warp_first=True)
        run(shim, place, stream, index, count, capacity)
        shim.configure()


def test_an_index_that_is_no_row_is_skipped(shim, place, values, dtype):
    stream = values(4, 72, dtype)
    run(shim, place, stream, [3, -1, 0, 4], 4, 4)
    run(shim, place, stream, [2**40, -(2**40), 2, 2], 4, 4)


def test_copies_bits(shim, place, dtype):
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    stream = torch.arange(-512, 512, dtype=bits).view(dtype).reshape(2, -1)  # negative numbers are NaN with payloads
    run(shim, place, stream, [1, 0], 2, 2)
