"""``RowNorms``: the op ``row_l2norm`` for few rows on a CPU, without its way through the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from void_ext import _library, ops
from void_ext.testing import assert_bits_equal

_library.load()
_host: Any = pytest.importorskip("void_ext._host")
RowNorms = _host.RowNorms

pytestmark = pytest.mark.skipif(not _host.tensors_visible(), reason="this torch does not show its tensors")


@settings(max_examples=100, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    width=st.integers(0, 700),
    columns=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    offset=st.integers(0, 3),
    data=st.data(),
)
def test_same_bits_as_the_op(
    lead: list[int], width: int, columns: int, dtype: torch.dtype, offset: int, data: Any
) -> None:
    column = data.draw(st.integers(0, columns - 1))
    memory = torch.randn(torch.Size([*lead, width]).numel() + offset).to(dtype)
    stream = memory[offset:].view(*lead, width)  # at any alignment
    rows = torch.Size(lead).numel()
    found, expected = torch.full((rows, columns), -7.0), torch.full((rows, columns), -7.0)
    ops.row_l2norm(stream, expected, column)
    assert RowNorms(found).write(stream, column)
    assert_bits_equal(found, expected)


def test_what_the_op_has_to_do() -> None:
    table = torch.full((2, 3), -7.0)
    stream = torch.randn(2, 1, 16)
    with FakeTensorMode() as fake:
        imitation = fake.from_tensor(stream)
    others = {
        "another number of rows": stream[:1],
        "no rows at all": torch.tensor(1.0),
        "another dtype": stream.double(),
        "rows apart": torch.randn(2, 1, 32)[..., :16],
        "columns apart": torch.randn(2, 1, 32)[..., ::2],
        "another device": torch.empty(2, 1, 16, device="meta"),
        "a subclass": torch.nn.Parameter(stream),
        "a fake tensor": imitation,
        "more than one thread's work": torch.randn(2, 1, 32768),
        "sparse": torch.eye(2).to_sparse(),
        "no tensor": [[1.0], [2.0]],
    }
    writer = RowNorms(table)
    for what, given_stream in others.items():
        assert not writer.write(given_stream, 1), what
    for column in (-1, 3, 2**40):
        assert not writer.write(stream, column)
    assert (table == -7).all()


def test_a_batched_tensor_is_left_to_the_op() -> None:
    table = torch.full((1, 1), -7.0)
    written = []

    def look(stream: torch.Tensor) -> torch.Tensor:
        written.append(RowNorms(table).write(stream, 0))
        return stream

    torch.func.vmap(look)(torch.randn(2, 1, 8))
    assert written == [False]
    assert table.item() == -7


def test_tensors_with_gradients_and_of_inference_mode() -> None:
    table = torch.zeros(1, 2)
    writer = RowNorms(table)
    with torch.inference_mode():
        assert writer.write(torch.full((1, 4), 2.0), 0)
    assert writer.write(torch.full((1, 4), 3.0, requires_grad=True), 1)
    assert table.tolist() == [[4.0, 6.0]]


@pytest.mark.parametrize(
    "table",
    [torch.zeros(3), torch.zeros(3, 3).double(), torch.zeros(4, 3).T, torch.zeros(2, 2, device="meta"), [1]],
    ids=["one dimension", "float64", "transposed", "meta", "no tensor"],
)
def test_a_table_that_is_none(table: Any) -> None:
    with pytest.raises(ValueError, match="table: expected a contiguous float32 tensor"):
        RowNorms(table)


def test_the_table_lives_as_long_as_its_writer() -> None:
    writer = RowNorms(torch.zeros(1, 1))
    torch.randn(64)
    assert writer.write(torch.ones(1, 4), 0)


def test_several_streams_at_once() -> None:
    streams = [torch.randn(2, 1, 16) for _ in range(5)]
    found, expected = torch.full((2, 6), -7.0), torch.full((2, 6), -7.0)
    for column, stream in enumerate(streams):
        ops.row_l2norm(stream, expected, column)
    assert RowNorms(found).write_all(streams) == 5
    assert_bits_equal(found, expected)

    found.fill_(-7.0)
    streams[2] = streams[2].double()  # for the op: what comes before it is written, nothing after it
    expected[:, 2:] = -7.0
    assert RowNorms(found).write_all(streams) == 2
    assert_bits_equal(found, expected)
    assert RowNorms(torch.zeros(2, 3)).write_all([torch.ones(2, 4)] * 4) == 3  # no more than there are columns
    assert RowNorms(found).write_all([]) == 0
