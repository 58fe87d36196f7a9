"""add_l2norm.cuh: h to the bit, norms against float64; a row's bits do not depend on its place or its neighbours."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from void_ext.testing import assert_bits_equal, assert_close

NAMES = ("h", "norms", "updates")
INFINITE = 1e30  # float32 norms of rows beyond sqrt(max) overflow


def run(shim, place, residual: Tensor, update: Tensor, layouts=("contiguous",) * 3, updates=True):
    """h, norms, change from poisoned outputs whose surroundings were checked."""
    count, width = residual.shape
    out = place.output(count, width, residual.dtype, layouts[2])
    norms, change = place.column(count), place.column(count, stride=1)
    inputs = place.rows(residual, layouts[0]), place.rows(update, layouts[1])
    shim.add_l2norm(*inputs, out.view, norms.view, change.view if updates else None)
    for name, output in zip(NAMES, (out, norms, change), strict=True):
        output.check(name)
    if not updates:
        change.untouched("updates")
    return out.view.clone(), norms.view.clone(), change.view.clone()


def check(result, residual: Tensor, update: Tensor, tolerance, updates=True) -> None:
    h, norms, change = result
    expected = torch.add(residual, update)
    assert_bits_equal(h, expected, "h", any_nan=True)
    assert_close(norms, expected.double().norm(dim=1), tolerance, "norms")
    if updates:
        difference = (expected.float() - residual.float()).double()
        assert_close(change, difference.norm(dim=1), tolerance, "updates")


@pytest.mark.parametrize("updates", [False, True], ids=["plain", "updates"])
def test_widths_and_layouts(shim, place, values, norm_tolerance, dtype, layout, width, updates):
    count = 7 if width < 3000 else 2
    residual, update = values(count, width, dtype), values(count, width, dtype, seed=1, scale=0.3)
    result = run(shim, place, residual, update, (layout,) * 3, updates)
    check(result, residual, update, norm_tolerance, updates)


@pytest.mark.parametrize("operand", range(3), ids=["residual", "update", "out"])
def test_one_operand_off_the_grid(shim, place, values, dtype, operand):
    """Each operand alone decides that the row cannot be moved in 16-byte packs; the bits stay."""
    residual, update = values(5, 1024, dtype), values(5, 1024, dtype, seed=1)
    aligned = run(shim, place, residual, update)
    for layout in ("shifted", "odd"):
        layouts = tuple(layout if i == operand else "contiguous" for i in range(3))
        result = run(shim, place, residual, update, layouts)
        for name, left, right in zip(NAMES, result, aligned, strict=True):
            assert_bits_equal(left, right, name)


@pytest.mark.parametrize("count", [0, 1, 7, 33])
@pytest.mark.parametrize("size", [0, 1, 577, 2304])
def test_row_counts(shim, place, values, norm_tolerance, dtype, count, size):
    residual, update = values(count, size, dtype), values(count, size, dtype, seed=1)
    check(run(shim, place, residual, update), residual, update, norm_tolerance)


@pytest.mark.parametrize("size", [64, 577, 2304, 4096])
def test_a_row_has_the_same_bits_anywhere(shim, place, values, dtype, size):
    """Alone, among 33, with one or two blocks for all rows, and with the warps in either order."""
    residual, update = values(33, size, dtype), values(33, size, dtype, seed=1)
    together = run(shim, place, residual, update)
    alone = [run(shim, place, residual[i : i + 1], update[i : i + 1]) for i in range(33)]
    runs = {"alone": tuple(torch.cat(parts) for parts in zip(*alone, strict=True))}
    for limit in (1, 2):
        shim.configure(grid_limit=limit, last_warp_first=limit == 2)
        runs[f"{limit} blocks"] = run(shim, place, residual, update)
    for how, result in runs.items():
        for name, left, right in zip(NAMES, result, together, strict=True):
            assert_bits_equal(left, right, f"{name}, {how}")


@pytest.mark.parametrize("size", [16, 577])
def test_special_values(shim, place, special_rows, norm_tolerance, dtype, layout, size):
    residual, update = special_rows(dtype, size)
    h, norms, change = run(shim, place, residual, update, (layout,) * 3)
    expected = torch.add(residual, update)
    assert_bits_equal(h, expected, "h", any_nan=True)
    truth, difference = expected.double().norm(dim=1), (expected.float() - residual.float()).double().norm(dim=1)
    for name, got, want in (("norms", norms, truth), ("updates", change, difference)):
        assert_close(got, torch.where(want > INFINITE, torch.inf, want), norm_tolerance, name)


@pytest.mark.parametrize("dtype16", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("seed", [None, 1, 2], ids=["zero", "small", "large"])
def test_every_16_bit_pattern(shim, place, values, dtype16, seed):
    residual = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype16).reshape(16, 4096)
    update = torch.zeros_like(residual)
    if seed is not None:
        update = values(16, 4096, dtype16, seed, scale=10.0 ** (4 * seed - 6))
    h, _, _ = run(shim, place, residual, update)
    assert_bits_equal(h, torch.add(residual, update), "h", any_nan=True)


@pytest.mark.parametrize("size", [8192 + 4, 33000])
def test_rows_wider_than_a_block_holds(shim, place, values, norm_tolerance, size):
    residual, update = values(2, size, torch.float32), values(2, size, torch.float32, seed=1)
    result = run(shim, place, residual, update)
    assert shim.threads_per_row == 512
    check(result, residual, update, norm_tolerance)
    shifted = run(shim, place, residual, update, ("shifted",) * 3)
    assert_bits_equal(shifted[1], result[1], "norms")


def test_threads_depend_on_the_width_alone(shim, place, values, dtype):
    for size in (64, 577, 4096, 5120):
        threads = set()
        for count in (1, 2, 33):
            for where in ("contiguous", "shifted"):
                residual = values(count, size, dtype)
                run(shim, place, residual, residual, (where,) * 3)
                threads.add(shim.threads_per_row)
        assert len(threads) == 1, f"width {size}: {threads}"


def test_offsets_beyond_2_to_the_31(shim, norm_tolerance):
    """Three rows 2**30 + 8 elements apart, in memory that is only reserved."""
    stride, width = 2**30 + 8, 24
    noreserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
    rows = []
    for _ in range(3):
        try:
            memory = mmap.mmap(-1, (2 * stride + width) * 2, flags=flags)
        except OSError as error:
            pytest.skip(f"cannot reserve 4 GiB of addresses: {error}")
        rows.append(torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, width), (stride, 1)))
    residual, update, out = rows
    residual.copy_(torch.arange(3 * width).reshape(3, width))
    update.fill_(0.5)
    norms = torch.zeros(3)
    shim.add_l2norm(residual, update, out, norms)
    assert_bits_equal(out.clone(), torch.add(residual, update), "h")
    assert_close(norms, out.double().norm(dim=1), norm_tolerance, "norms")
