"""Sizes that overflow: more than 2**31 elements, rows as far apart, more rows than a grid's other axes take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from void_ext import ops, reference
from void_ext.testing import Tolerance, assert_bits_equal, assert_close

pytestmark = pytest.mark.gpu

NORM = Tolerance(2e-6, 1e-30, "as in python_tests/kernels")
GIB = 2**30


@pytest.fixture
def room(cuda):
    """room(gib): skips where the device has less memory free; what the test held is given back."""

    def need(gib: float) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(cuda)[0] / GIB
        if free < gib:
            pytest.skip(f"needs {gib} GiB of device memory, {free:.1f} are free")

    yield need
    torch.cuda.empty_cache()


def check(h: Tensor, norms: Tensor, residual: Tensor, update: Tensor) -> None:
    for first in range(0, residual.shape[0], 65536):
        part = slice(first, first + 65536)
        expected = torch.add(residual[part], update[part])
        assert_bits_equal(h[part], expected, f"h, rows from {first}")
        assert_close(norms[part], expected.float().double().norm(dim=1), NORM, f"norms, rows from {first}")


@pytest.mark.parametrize("width", [4096, 4097])
def test_more_than_2_to_the_31_elements(cuda, room, width):
    room(28)
    count = 2**31 // width + 100
    residual = torch.randn(count, width, dtype=torch.bfloat16, device=cuda)
    update = torch.randn(count, width, dtype=torch.bfloat16, device=cuda)
    norms = torch.zeros(count, 2, device=cuda)
    h = ops.add_l2norm(residual, update, norms, 1)
    check(h, norms[:, 1], residual, update)
    weight = torch.ones(width, dtype=torch.bfloat16, device=cuda)
    fused_norms = torch.zeros(count, 2, device=cuda)
    fused, normed = ops.add_rms_norm(residual, update, weight, 1e-5, fused_norms, 1)
    assert_bits_equal(fused_norms, norms, "norms of both ops")
    assert_bits_equal(fused[-100:], h[-100:], "h of both ops, last rows")
    last = h[-100:].double()
    assert bool((normed[-100:].double() - last / last.square().mean(dim=1, keepdim=True).sqrt()).abs().max() < 0.05)
    kept = fused.zero_()
    table = torch.tensor([2.0, 3.0], device=cuda).repeat(count, 1)  # delta 1 >= 0: active
    table[1::2] = torch.tensor([3.0, 2.0], device=cuda)  # void
    ops.exit_select(kept, h, table, 0, 0.8)
    for first in range(0, count, 65536):
        part = kept[first : first + 65536]
        assert_bits_equal(part[::2], h[first : first + 65536][::2], f"kept, active rows from {first}")
        assert not bool(part[1::2].any()), f"kept, void rows from {first}"


def test_rows_far_apart(cuda, room):
    """Three rows, 2**30 + 8 elements from each to the next."""
    room(16)
    stride = 2**30 + 8
    rows = []
    for seed in (0, 1):
        memory = torch.empty(2 * stride + 576, dtype=torch.bfloat16, device=cuda)
        view = memory.as_strided((3, 576), (stride, 1))
        rows.append(view.copy_(torch.randn(3, 576, generator=torch.Generator().manual_seed(seed))))
    norms = torch.zeros(3, 1, device=cuda)
    h = ops.add_l2norm(*rows, norms, 0)
    check(h, norms[:, 0], *rows)


@pytest.mark.parametrize("width", [1, 64, 1024])
def test_more_rows_than_65535(cuda, width):
    residual, update = torch.randn(200_003, width, device=cuda), torch.randn(200_003, width, device=cuda)
    norms = torch.zeros(200_003, 1, device=cuda)
    h = ops.add_l2norm(residual, update, norms, 0)
    check(h, norms[:, 0], residual, update)


def test_many_rows_of_masks(cuda):
    """Far more rows than the mask's blocks hold at once, against the same rows in parts."""
    norms = torch.rand(1_000_003, 33, device=cuda).cumsum(dim=1)
    together = ops.void_mask(norms, 0.8)
    for first in range(0, 1_000_003, 300_000):
        assert_bits_equal(ops.void_mask(norms[first : first + 300_000], 0.8), together[first : first + 300_000], "mask")
    assert 0.05 < float(together.float().mean()) < 0.95


@pytest.mark.parametrize("width", [4096, 4097])
def test_dispatch_of_more_than_2_to_the_31_elements(cuda, room, width):
    room(20)
    count = 2**31 // width + 100
    residual = torch.randn(count, width, dtype=torch.bfloat16, device=cuda)
    update = torch.randn(count, width, dtype=torch.bfloat16, device=cuda)
    on = torch.arange(count, device=cuda) % 3 == 0
    h = ops.keep_rows(residual, update, on)
    for first in range(0, count, 65536):
        part = slice(first, first + 65536)
        expected = torch.where(on[part, None], torch.add(residual[part], update[part]), residual[part])
        assert_bits_equal(h[part], expected, f"h, rows from {first}")
    index, _, number = ops.compact(on)
    packed = ops.gather_rows(h, index, number, count)
    ones = torch.arange(0, count, 3, device=cuda)
    assert_bits_equal(packed[: len(ones)][-100:], h[ones[-100:]], "packed, last rows")
    residual.zero_()
    ops.scatter_rows(residual, packed, index, number)
    for first in range(0, count, 65536):
        part = slice(first, first + 65536)
        expected = torch.where(on[part, None], h[part], 0.0).to(h.dtype)
        assert_bits_equal(residual[part], expected, f"scattered, rows from {first}")


def test_many_flags(cuda):
    """Far more tiles than a forward call has; one block walks them."""
    on = torch.rand(3_000_017, device=cuda) < 0.3
    for got, expected in zip(ops.compact(on), reference.compact(on), strict=True):
        assert_bits_equal(got, expected)
