from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from void_ext import ops, reference
from void_ext.testing import assert_bits_equal

GATHER = torch.ops.void_ext.gather_rows.default


def chosen(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    on = (torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < 0.5).to(device)
    index, _, count = reference.compact(on)
    return index, count


def test_matches_reference(device, dtype, layout, shape, random_rows) -> None:
    rows, width = shape
    stream = layout(random_rows(*shape))
    index, count = chosen(rows, device)
    for capacity in {0, int(count), rows // 2, rows}:
        packed = ops.gather_rows(stream, index, count, capacity)
        assert packed.shape == (capacity, width)
        assert packed.is_contiguous()
        written = min(int(count), capacity)
        expected = reference.gather_rows(stream, index, count, capacity)
        assert_bits_equal(packed[:written], expected[:written], f"capacity {capacity}")
        assert_bits_equal(packed[:written], stream[index[:written]].contiguous(), f"capacity {capacity}")


def test_copies_bits(device, dtype, special_pairs) -> None:
    stream, _ = special_pairs
    order = torch.randperm(len(stream), generator=torch.Generator().manual_seed(0)).to(device)
    count = torch.tensor([len(stream)], device=device)
    assert_bits_equal(ops.gather_rows(stream, order, count, len(stream)), stream[order].contiguous())


def test_any_order_and_rows_that_come_twice(device, random_rows) -> None:
    stream = random_rows(4, 33)
    index = torch.tensor([3, 0, 0, 2], device=device)
    packed = ops.gather_rows(stream, index, torch.tensor([4], device=device), 4)
    assert_bits_equal(packed, stream[[3, 0, 0, 2]])


def test_index_at_any_stride_and_of_any_length(device, random_rows) -> None:
    stream, count = random_rows(9, 33), torch.tensor([3], device=device)
    index = torch.tensor([8, -7, 2, -7, 5, -7], device=device)[::2]
    assert_bits_equal(ops.gather_rows(stream, index, count, 3), stream[[8, 2, 5]])
    longer = torch.cat([index, torch.full((20,), 99, device=device)])
    assert_bits_equal(ops.gather_rows(stream, longer, count, 3), stream[[8, 2, 5]])


def test_three_dimensions_and_one(device, dtype, random_rows) -> None:
    stream = random_rows(2, 3, 40)
    index, count = chosen(6, device)
    packed = ops.gather_rows(stream, index, count, int(count))
    assert_bits_equal(packed, stream.view(6, 40)[index[: int(count)]])
    zero, one = torch.tensor([0], device=device), torch.tensor([1], device=device)
    assert_bits_equal(ops.gather_rows(stream[0, 0], zero, one, 1), stream[0, :1])


def test_rows_beyond_the_count_are_not_looked_at(device, random_rows) -> None:
    """Their index is no row, and on a CPU it would be refused."""
    stream = random_rows(5, 33)
    index = torch.tensor([4, 2, -1, 2**40, -(2**40)], device=device)
    packed = ops.gather_rows(stream, index, torch.tensor([2], device=device), 5)
    assert_bits_equal(packed[:2], stream[[4, 2]])


def test_a_count_beyond_the_capacity_is_cut(device, random_rows) -> None:
    stream = random_rows(5, 33)
    index = torch.arange(5, device=device)
    packed = ops.gather_rows(stream, index, torch.tensor([2**40], device=device), 3)
    assert_bits_equal(packed, stream[:3])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(0, 70),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_random_shapes(rows: int, width: int, share: float, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    stream, on = torch.randn(rows, width).to(dtype), torch.rand(rows) < share
    index, _, count = ops.compact(on)
    assert_bits_equal(ops.gather_rows(stream, index, count, int(count)), stream[on])


def test_opcheck(device, dtype, random_rows) -> None:
    index, count = chosen(
        6, device
    )  # as many rows as the count: no others, whose values could differ from call to call
    torch.library.opcheck(GATHER, (random_rows(3, 2, 33), index, count, int(count)))
    torch.library.opcheck(GATHER, (random_rows(3, 2, 33), index, count, 0))


def test_compiles_without_breaks(device, random_rows) -> None:
    def packed(stream, index, count):
        return ops.gather_rows(stream * 2, index, count, 4) + 1

    stream, index, count = random_rows(6, 33), torch.arange(6, device=device), torch.tensor([4], device=device)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")(stream, index, count)
    assert_bits_equal(compiled, packed(stream, index, count))


def test_refuses_to_lose_a_gradient(device) -> None:
    stream = torch.ones(2, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"void_ext::gather_rows: stream: .*requires no grad"):
        ops.gather_rows(stream, torch.arange(2, device=device), torch.tensor([2], device=device), 2)


ARGUMENTS = {
    "stream": torch.ones(3, 8),
    "index": torch.arange(3),
    "count": torch.tensor([3]),
    "capacity": 3,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": torch.ones(())}, "stream: expected at least one dimension, [..., D], got a tensor of none"),
        ({"stream": torch.ones(3, 8).double()}, "stream: expected float32, float16 or bfloat16, got float64"),
        ({"capacity": 4}, "capacity: expected 0 to 3, the rows of stream, got 4"),
        ({"capacity": -1}, "capacity: expected 0 to 3, the rows of stream, got -1"),
        ({"index": torch.arange(3).int()}, "index: expected int64, got int32"),
        ({"index": torch.arange(3)[None]}, "index: expected one dimension, got shape [1, 3]"),
        ({"index": torch.arange(2)}, "index: expected at least 3 entries, the capacity, got shape [2]"),
        ({"count": torch.tensor([3.0])}, "count: expected int64, got float32"),
        ({"count": torch.tensor(3)}, "count: expected one dimension, got shape []"),
        ({"count": torch.tensor([3, 3])}, "count: expected shape [1], got [2]"),
    ],
)
def test_names_what_is_wrong(device, changes, message) -> None:
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in {**ARGUMENTS, **changes}.items()}
    with pytest.raises(ValueError, match=re.escape(f"void_ext::gather_rows: {message}")):
        ops.gather_rows(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"index": torch.tensor([0, 3, 1])},
            "index: expected rows 0 to 2 of stream below the count, got 3 at 1",
        ),
        (
            {"index": torch.tensor([0, 1, -1])},
            "index: expected rows 0 to 2 of stream below the count, got -1 at 2",
        ),
        ({"count": torch.tensor([-1])}, "count: expected a number of rows >= 0, got -1"),
    ],
)
def test_a_cpu_reads_index_and_count(changes, message) -> None:
    with pytest.raises(ValueError, match=re.escape(f"void_ext::gather_rows: {message}")):
        ops.gather_rows(**{**ARGUMENTS, **changes})


@pytest.mark.gpu
def test_cuda_skips_what_is_no_row() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stream = torch.randn(4, 33, device="cuda")
    index = torch.tensor([3, 4, -1, 2**40], device="cuda")
    packed = ops.gather_rows(stream, index, torch.tensor([4], device="cuda"), 4)
    assert_bits_equal(packed[:1], stream[3:])
    assert_bits_equal(
        ops.gather_rows(stream, index, torch.tensor([-1], device="cuda"), 0), torch.empty(0, 33, device="cuda")
    )
