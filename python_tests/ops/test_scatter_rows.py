from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from void_ext import ops, reference
from void_ext.testing import assert_bits_equal

SCATTER = torch.ops.void_ext.scatter_rows.default


def chosen(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    on = (torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < 0.5).to(device)
    index, _, count = reference.compact(on)
    return index, count, on


def test_matches_reference(device, dtype, layout, shape, random_rows) -> None:
    number, width = shape
    index, count, on = chosen(number, device)
    for capacity in {0, int(count), number // 2, number}:
        before = random_rows(number, width)
        rows = layout(random_rows(capacity, width, seed=1))
        stream, expected = before.clone(), before.clone()
        reference.scatter_rows(expected, rows, index, count)
        assert ops.scatter_rows(stream, rows, index, count) is None
        assert_bits_equal(stream, expected, f"{capacity} rows")
        written = index[: min(int(count), capacity)]
        assert_bits_equal(stream[written], rows[: len(written)].contiguous(), f"{capacity} rows, written")
        assert_bits_equal(stream[~on], before[~on], "rows that are off")


def test_copies_bits(device, dtype, special_pairs) -> None:
    rows, stream = special_pairs
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(device)
    ops.scatter_rows(stream, rows, order, torch.tensor([len(rows)], device=device))
    assert_bits_equal(stream[order], rows.contiguous())


def test_writes_into_rows_of_a_larger_tensor(device, dtype, random_rows) -> None:
    wide = random_rows(6, 3, 50)
    before, rows = wide.clone(), random_rows(2, 40, seed=1)
    ops.scatter_rows(wide[..., 7:47], rows, torch.tensor([17, 4], device=device), torch.tensor([2], device=device))
    expected = before.clone()
    expected[5, 2, 7:47], expected[1, 1, 7:47] = rows[0], rows[1]
    assert_bits_equal(wide, expected)


def test_rows_may_lie_beside_the_stream(device, random_rows) -> None:
    """In one larger tensor, as long as no element is shared."""
    wide = random_rows(6, 40)
    rows = wide[:, 20:].clone()
    order = torch.tensor([1, 0, 3, 2, 5, 4], device=device)
    ops.scatter_rows(wide[:, :20], wide[:, 20:], order, torch.tensor([6], device=device))
    assert_bits_equal(wide[:, :20].contiguous(), rows[order])
    assert_bits_equal(wide[:, 20:].contiguous(), rows)


def test_rows_beyond_the_count_are_neither_read_nor_written(device, random_rows) -> None:
    stream = random_rows(5, 33)
    expected, rows = stream.clone(), random_rows(4, 33, seed=1)
    expected[[4, 2]] = rows[:2]
    rows[2:] = torch.nan
    index = torch.tensor([4, 2, 0, 2**40, -(2**40)], device=device)
    ops.scatter_rows(stream, rows, index, torch.tensor([2], device=device))
    assert_bits_equal(stream, expected)


def test_a_count_beyond_the_rows_is_cut(device, random_rows) -> None:
    stream, rows = random_rows(5, 33), random_rows(3, 33, seed=1)
    expected = torch.cat([rows, stream[3:]])
    ops.scatter_rows(stream, rows, torch.arange(5, device=device), torch.tensor([2**40], device=device))
    assert_bits_equal(stream, expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(0, 70),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_takes_back_what_gather_rows_packed(rows: int, width: int, share: float, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    stream, on = torch.randn(rows, width).to(dtype), torch.rand(rows) < share
    index, _, count = ops.compact(on)
    target = torch.full_like(stream, -7.0)
    ops.scatter_rows(target, ops.gather_rows(stream, index, count, rows), index, count)
    assert_bits_equal(target, torch.where(on[:, None], stream, -7.0).to(dtype))


def test_opcheck(device, dtype, random_rows) -> None:
    index, count, _ = chosen(6, device)
    torch.library.opcheck(SCATTER, (random_rows(3, 2, 33), random_rows(6, 33, seed=1), index, count))


def test_compiles_without_breaks(device, random_rows) -> None:
    def layer(stream, rows, index, count):
        ops.scatter_rows(stream, rows * 2, index, count)
        return stream + 1

    index, count, _ = chosen(6, device)
    eager, compiled, rows = random_rows(6, 33), random_rows(6, 33), random_rows(6, 33, seed=1)
    expected = layer(eager, rows, index, count)
    result = torch.compile(layer, fullgraph=True, backend="aot_eager")(compiled, rows, index, count)
    assert_bits_equal(result, expected)
    assert_bits_equal(compiled, eager)


def test_refuses_to_lose_a_gradient(device) -> None:
    rows = torch.ones(2, 4, device=device, requires_grad=True)
    index, count = torch.arange(2, device=device), torch.tensor([2], device=device)
    with pytest.raises(RuntimeError, match=r"void_ext::scatter_rows: rows: .*requires no grad"):
        ops.scatter_rows(torch.zeros(2, 4, device=device), rows, index, count)


def arguments(**changes: Tensor) -> dict[str, Tensor]:
    index, count = torch.arange(3), torch.tensor([2])
    return {"stream": torch.zeros(3, 8), "rows": torch.ones(2, 8), "index": index, "count": count, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": torch.zeros(())}, "stream: expected at least one dimension, [..., D], got a tensor of none"),
        ({"stream": torch.zeros(3, 8).double()}, "stream: expected float32, float16 or bfloat16, got float64"),
        ({"rows": torch.ones(2, 8).half()}, "rows: expected float32 like stream, got float16"),
        (
            {"rows": torch.ones(2, 7)},
            "rows: expected shape [n, 8] with n <= 3, the rows of stream, got [2, 7]",
        ),
        (
            {"rows": torch.ones(4, 8)},
            "rows: expected shape [n, 8] with n <= 3, the rows of stream, got [4, 8]",
        ),
        (
            {"rows": torch.ones(1, 2, 8)},
            "rows: expected shape [n, 8] with n <= 3, the rows of stream, got [1, 2, 8]",
        ),
        ({"index": torch.arange(3.0)}, "index: expected int64, got float32"),
        ({"index": torch.arange(1)}, "index: expected at least 2 entries, one for each of rows, got shape [1]"),
        ({"count": torch.tensor(2)}, "count: expected one dimension, got shape []"),
    ],
)
def test_names_what_is_wrong_before_writing(device, changes, message) -> None:
    given = {name: tensor.to(device) for name, tensor in arguments(**changes).items()}
    with pytest.raises(ValueError, match=re.escape(f"void_ext::scatter_rows: {message}")):
        ops.scatter_rows(**given)
    assert given["stream"].count_nonzero() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.tensor([0, 3, 1])}, "index: expected rows 0 to 2 of stream below the count, got 3 at 1"),
        ({"index": torch.tensor([-1, 1, 0])}, "index: expected rows 0 to 2 of stream below the count, got -1 at 0"),
        ({"count": torch.tensor([-3])}, "count: expected a number of rows >= 0, got -3"),
    ],
)
def test_a_cpu_reads_index_and_count_before_writing(changes, message) -> None:
    given = arguments(**changes)
    with pytest.raises(ValueError, match=re.escape(f"void_ext::scatter_rows: {message}")):
        ops.scatter_rows(**given)
    assert given["stream"].count_nonzero() == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda wide: (wide, wide),
        lambda wide: (wide[:, :8], wide[:, 4:12]),
        lambda wide: (wide[1:], wide[:-1]),
        lambda wide: (wide.view(-1)[:48].view(6, 8), wide.view(-1)[16:48].view(2, 16)[:, :8]),
    ],
    ids=["the same", "half a row", "a row further", "other strides"],
)
def test_refuses_rows_that_overlap_the_stream(device, make) -> None:
    stream, rows = make(torch.zeros(6, 16, device=device))
    index, count = torch.arange(6, device=device), torch.tensor([2], device=device)
    with pytest.raises(ValueError, match=r"scatter_rows: rows: expected memory apart from that of stream, .*, got "):
        ops.scatter_rows(stream, rows, index, count)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (lambda: torch.zeros(8, 3).t(), "got shape [3, 8] with strides [1, 3]"),
        (lambda: torch.zeros(1, 8).expand(3, 8), "got shape [3, 8] with strides [0, 1]"),
    ],
)
def test_refuses_to_write_where_no_copy_can_stand_in(stream, message) -> None:
    target = stream()
    with pytest.raises(ValueError, match=r"stream: is written to, so expected rows .*" + re.escape(message)):
        ops.scatter_rows(**arguments(stream=target))
    assert target.count_nonzero() == 0


@pytest.mark.gpu
def test_cuda_skips_what_is_no_row() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stream, rows = torch.zeros(4, 33, device="cuda"), torch.ones(4, 33, device="cuda")
    index = torch.tensor([3, 4, -1, 2**40], device="cuda")
    ops.scatter_rows(stream, rows, index, torch.tensor([4], device="cuda"))
    assert stream.sum(dim=1).tolist() == [0, 0, 0, 33]
    ops.scatter_rows(stream.zero_(), rows, index, torch.tensor([-1], device="cuda"))
    assert stream.count_nonzero() == 0
