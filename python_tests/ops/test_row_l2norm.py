from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from void_ext import ops, reference
from void_ext.testing import assert_bits_equal, assert_close, tolerance

ROW = torch.ops.void_ext.row_l2norm.default


def test_matches_reference(device, dtype, layout, shape, random_rows, table, only_written) -> None:
    rows, width = shape
    stream = layout(random_rows(*shape))
    before = stream.clone()
    norms, again = table(rows + 2, 5), table(rows + 2, 5)
    assert ops.row_l2norm(stream, norms, 3) is None
    reference.row_l2norm(stream, again, 3)
    assert_close(norms, again.double(), tolerance("norm", dtype, width), "norms")
    only_written(norms, rows, 3)
    assert_bits_equal(stream, before, "stream")


def test_same_bits_as_add_l2norm(dtype, shape, random_rows, table) -> None:
    rows, _ = shape
    added, read = table(rows, 2), table(rows, 2)
    h = ops.add_l2norm(random_rows(*shape), random_rows(*shape, seed=1), added, 1)
    ops.row_l2norm(h, read, 1)
    assert_bits_equal(read, added)


def test_special_values(dtype, special_pairs, table) -> None:
    stream = torch.cat(special_pairs, dim=1)
    norms = table(len(stream), 1)
    ops.row_l2norm(stream, norms, 0)
    squares = stream.float().square()  # float32, as in the op
    assert_close(norms[:, 0], squares.double().sum(-1).sqrt().float().double(), tolerance("norm", dtype, 66))


def test_a_constant_row_does_not_stagnate(device, table) -> None:
    """A float32 sum that only ever adds ones stops at 2^24; folding keeps the partial sums small."""
    width = 2**25 + 3
    norms = table(1, 1)
    ops.row_l2norm(torch.ones(1, width, device=device), norms, 0)
    assert norms.item() == pytest.approx(width**0.5, rel=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    width=st.integers(0, 300),
    pad=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    swap=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_random_shapes(lead: list[int], width: int, pad: int, dtype: torch.dtype, swap: bool, seed: int) -> None:
    torch.manual_seed(seed)
    stream = torch.randn(*lead, width + pad).to(dtype)[..., pad:]
    if swap and len(lead) > 1:
        stream = stream.transpose(0, 1)
    rows = stream.shape[:-1].numel()
    norms, again = torch.zeros(rows, 1), torch.zeros(rows, 1)
    ops.row_l2norm(stream, norms, 0)
    reference.row_l2norm(stream, again, 0)
    assert_close(norms, again.double(), tolerance("norm", dtype, width))


def test_opcheck(device, dtype, random_rows, table) -> None:
    torch.library.opcheck(ROW, (random_rows(3, 2, 33), table(6, 3), 1))
    torch.library.opcheck(ROW, (random_rows(3, 2, 33).transpose(0, 1), table(7, 3), 0))


def test_compiles_without_breaks(device, random_rows, table) -> None:
    def layer(stream, norms):
        ops.row_l2norm(stream * 2, norms, 1)
        return norms + 1

    stream, eager, compiled = random_rows(3, 33), table(3, 2), table(3, 2)
    expected = layer(stream, eager)
    assert_bits_equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(stream, compiled), expected)
    assert_bits_equal(compiled, eager)


def test_refuses_to_lose_a_gradient(device) -> None:
    stream, norms = torch.ones(2, 4, device=device, requires_grad=True), torch.zeros(2, 1, device=device)
    with pytest.raises(RuntimeError, match=r"void_ext::row_l2norm: stream: .*requires no grad"):
        ops.row_l2norm(stream, norms, 0)
    ops.row_l2norm(stream.detach(), norms, 0)
    assert norms[:, 0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": torch.ones(())}, "stream: expected at least one dimension, [..., D], got a tensor of none"),
        ({"stream": torch.ones(3, 8).long()}, "stream: expected float32, float16 or bfloat16, got int64"),
        ({"norms": torch.ones(3, 4).bfloat16()}, "norms: expected float32, got bfloat16"),
        ({"norms": torch.ones(2, 3, 4)}, "norms: expected two dimensions, [rows, columns], got shape [2, 3, 4]"),
        ({"norms": torch.ones(2, 4)}, "norms: expected at least 3 rows, one for each row of stream, got shape [2, 4]"),
        ({"column": 4}, "column: expected 0 to 3, a column of norms, got 4"),
    ],
)
def test_names_what_is_wrong_before_writing(device, changes, message) -> None:
    arguments = {"stream": torch.ones(3, 8), "norms": torch.zeros(3, 4), "column": 1, **changes}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    before = arguments["norms"].clone()
    with pytest.raises(ValueError, match=re.escape(f"void_ext::row_l2norm: {message}")):
        ops.row_l2norm(**arguments)
    assert_bits_equal(arguments["norms"], before)
