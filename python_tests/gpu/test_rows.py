"""The bits of a row: the same in any batch and at any alignment, the same as the kernels give on the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.hostshim import HostShim, build
from void_ext import ops
from void_ext.testing import assert_bits_equal, assert_ulp_close

pytestmark = pytest.mark.gpu

WIDTHS = [1, 64, 576, 577, 3584, 4096, 8192, 16384 + 8]
EPS = 1e-5
NAMES = ("h", "normed", "norms", "updates", "h's norms")


@pytest.fixture(scope="module")
def shim() -> HostShim:
    try:
        return HostShim(build())
    except RuntimeError as error:
        pytest.skip(str(error))


def rows(count: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fused(residual: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Every result of the three row ops; the add's and the fused norm's must agree where they promise the same."""
    device, count = residual.device, residual.shape[0]
    tables = [torch.full((count, 3), -7.0, device=device) for _ in range(4)]
    h, normed = ops.add_rms_norm(residual, update, weight, EPS, tables[0], 1, tables[1])
    plain = ops.add_l2norm(residual, update, tables[2], 1, tables[3])
    stream = torch.full((count, 1), -7.0, device=device)
    ops.row_l2norm(h, stream, 0)
    together = torch.full((5, count), -7.0, device=device).t()  # by column, as a patched model has it
    ops.streams_l2norm([residual, h, update, h], together, 1)
    for column in (2, 4):
        assert_bits_equal(together[:, column], stream[:, 0], "norms of streams")
    assert_bits_equal(h, plain, "h of both ops")
    assert_bits_equal(tables[0], tables[2], "norms of both ops")
    assert_bits_equal(tables[1], tables[3], "updates of both ops")
    return h, normed, tables[0][:, 1], tables[1][:, 0], stream[:, 0]


@pytest.mark.parametrize("width", WIDTHS)
def test_batch_invariance(cuda, dtype, width):
    """A row alone, among 7, 133 and 5000 others, shifted by one element, and strided."""
    residual, update = rows(133, width, dtype, 1).to(cuda), rows(133, width, dtype, 2).to(cuda)
    weight = rows(1, width, dtype, 3)[0].to(cuda)
    expected = fused(residual, update, weight)
    for count in (1, 7):
        for name, left, right in zip(NAMES, fused(residual[:count], update[:count], weight), expected, strict=True):
            assert_bits_equal(left, right[:count], f"{name}, {count} rows")
    many = fused(residual.repeat(40, 1)[:5000], update.repeat(40, 1)[:5000], weight)
    for name, left, right in zip(NAMES, many, expected, strict=True):
        assert_bits_equal(left[133:266], right, f"{name}, 5000 rows")
    for offset, gap in ((1, 0), (0, 1), (8, 8), (3, 5)):
        moved = []
        for tensor in (residual, update):
            view = torch.empty(offset + 133 * (width + gap), dtype=dtype, device=cuda).as_strided(
                (133, width), (width + gap, 1), offset
            )
            moved.append(view.copy_(tensor))
        for name, left, right in zip(NAMES, fused(*moved, weight), expected, strict=True):
            assert_bits_equal(left, right, f"{name}, offset {offset}, gap {gap}")


@pytest.mark.parametrize("width", WIDTHS)
def test_equal_to_the_kernels_on_the_host(cuda, dtype, width, shim):
    """The kernels write out every rounding, so the host finds the same bits; rsqrtf alone is the device's own."""
    residual, update, weight = rows(7, width, dtype, 1), rows(7, width, dtype, 2), rows(1, width, dtype, 3)[0]
    h, normed = torch.empty_like(residual), torch.empty_like(residual)
    norms, change = torch.empty(7), torch.empty(7)
    shim.add_rms_norm(residual, update, weight, EPS, h, normed, norms, change)
    got = [tensor.cpu() for tensor in fused(residual.to(cuda), update.to(cuda), weight.to(cuda))]
    for name, left, right in zip(NAMES, got, (h, None, norms, change, norms), strict=True):
        if right is not None:
            assert_bits_equal(left, right, name)
    # An rsqrt off by 2 ulp of float32: as many ulp and two more in float32, a rare flip of one rounding elsewhere.
    share = 1.0 if dtype == torch.float32 else 1e-3 + 4 / normed.numel()
    assert_ulp_close(got[1], normed, "normed", max_ulp=6 if dtype == torch.float32 else 2, max_share=share)


def test_special_values(cuda, dtype, shim):
    info = torch.finfo(dtype)
    step = info.smallest_normal * info.eps
    pairs = [(torch.nan, 1.0), (torch.inf, 1.0), (torch.inf, -torch.inf), (info.max, info.max), (step, step)]
    pairs += [(-step, step), (info.smallest_normal, -step), (-0.0, -0.0), (1.0, info.eps / 2), (1.0, 0.75 * info.eps)]
    residual, update = torch.zeros(len(pairs), 577, dtype=dtype), torch.zeros(len(pairs), 577, dtype=dtype)
    for row, (left, right) in enumerate(pairs):
        residual[row, 50 * row], update[row, 50 * row] = left, right
    h, norms, change = torch.empty_like(residual), torch.empty(len(pairs)), torch.empty(len(pairs))
    shim.add_l2norm(residual, update, h, norms, change)
    weight = torch.ones(577, dtype=dtype)
    got = [tensor.cpu() for tensor in fused(residual.to(cuda), update.to(cuda), weight.to(cuda))]
    assert_bits_equal(got[0], torch.add(residual, update), "h against torch.add on the CPU", any_nan=True)
    added = torch.add(residual.to(cuda), update.to(cuda)).cpu()
    assert_bits_equal(got[0], added, "h against torch.add on the GPU", any_nan=True)
    for name, left, right in (("norms", got[2], norms), ("updates", got[3], change)):
        assert_bits_equal(left, right, name, any_nan=True)


def test_masks_equal_the_host(cuda, shim):
    generator = torch.Generator().manual_seed(0)
    for layers in (1, 12, 32, 33, 80):
        norms = torch.randint(0, 40, (300, layers + 1), generator=generator) / 4
        norms[torch.rand(norms.shape, generator=generator) < 0.005] = torch.nan
        executed = torch.rand(300, layers, generator=generator) < 0.8
        for alpha in (0.0, 0.2, 0.8, 2.5):
            expected = torch.empty_like(executed)
            shim.void_mask(norms, executed, alpha, expected)
            got = ops.void_mask(norms.to(cuda), alpha, executed.to(cuda)).cpu()
            assert_bits_equal(got, expected, f"{layers} layers, alpha {alpha}")
            everything = ops.void_mask(norms.to(cuda), alpha)
            stream, kept = torch.ones(300, 8, device=cuda), torch.zeros(300, 8, device=cuda)
            ops.exit_select(kept, stream, norms.to(cuda), layers - 1, alpha)
            chosen = everything[:, -1:].expand(300, 8).float()
            assert_bits_equal(kept, chosen, f"exit_select, {layers} layers, alpha {alpha}")


@pytest.mark.parametrize("width", WIDTHS)
def test_kept_rows_equal_the_host_and_torch(cuda, dtype, width, shim):
    residual, update = rows(133, width, dtype, 1), rows(133, width, dtype, 2)
    on = torch.rand(133, generator=torch.Generator().manual_seed(3)) < 0.5
    expected = torch.empty_like(residual)
    shim.keep_rows(residual, update, on, expected)
    update[~on] = torch.nan
    left, right, flags = residual.to(cuda), update.to(cuda), on.to(cuda)
    h = ops.keep_rows(left, right, flags)
    assert_bits_equal(h.cpu(), expected, "h")
    assert_bits_equal(h[flags], torch.add(left, right)[flags], "h against torch.add, rows that are on")
    alone = [ops.keep_rows(left[i : i + 1], right[i : i + 1], flags[i : i + 1]) for i in range(9)]
    assert_bits_equal(torch.cat(alone), h[:9], "rows alone")


@pytest.mark.parametrize("width", WIDTHS)
def test_packed_rows_go_back(cuda, dtype, width):
    stream = rows(133, width, dtype, 1).to(cuda)
    on = (torch.rand(133, generator=torch.Generator().manual_seed(3)) < 0.5).to(cuda)
    index, inverse, count = ops.compact(on)
    packed = ops.gather_rows(stream, index, count, 133)
    number = int(count)
    assert_bits_equal(packed[:number], stream[on], "packed")
    assert_bits_equal(packed[inverse[on]], stream[on], "by inverse")
    target = torch.full_like(stream, -7.0)
    ops.scatter_rows(target, packed, index, count)
    assert_bits_equal(target, torch.where(on[:, None], stream, -7.0).to(dtype), "scattered")


def test_compaction_equals_the_host(cuda, shim):
    for count in (0, 1, 31, 257, 8192, 8193, 50_001):
        for share in (0.0, 0.1, 0.9, 1.0):
            on = torch.rand(count, generator=torch.Generator().manual_seed(count)) < share
            expected = [torch.empty(size, dtype=torch.int64) for size in (count, count, 1)]
            shim.compact(on, *expected)
            for name, left, right in zip(
                ("index", "inverse", "count"), ops.compact(on.to(cuda)), expected, strict=True
            ):
                assert_bits_equal(left.cpu(), right, f"{name}, {count} rows, {share} on")
