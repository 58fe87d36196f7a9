from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from void_ext import ops, reference
from void_ext.testing import assert_bits_equal, assert_close, tolerance

STREAMS = torch.ops.void_ext.streams_l2norm.default


def test_matches_reference_and_row_l2norm(device, dtype, layout, shape, random_rows, table) -> None:
    rows, width = shape
    streams = [layout(random_rows(rows, width, seed=seed)) for seed in range(3)]
    norms, again, single = (table(rows + 2, 6) for _ in range(3))
    assert ops.streams_l2norm(streams, norms, 2) is None
    reference.streams_l2norm(streams, again, 2)
    for place, stream in enumerate(streams):
        ops.row_l2norm(stream, single, 2 + place)
    assert_close(norms[:rows], again[:rows].double(), tolerance("norm", dtype, width), "norms")
    assert_bits_equal(norms, single)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300])
def test_any_number_of_streams(device, dtype, count, random_rows, table) -> None:
    """A launch holds 128."""
    streams = [random_rows(3, 70, seed=seed) for seed in range(7)]
    streams = [streams[place % 7] for place in range(count)]
    norms, single = table(4, count + 2), table(4, count + 2)
    ops.streams_l2norm(streams, norms, 1)
    for place, stream in enumerate(streams):
        ops.row_l2norm(stream, single, 1 + place)
    assert_bits_equal(norms, single)


def test_strides_of_each_stream_and_a_table_by_column(device, dtype, random_rows) -> None:
    rows = random_rows(6, 577)
    streams = [
        rows.view(2, 3, 577),
        torch.cat([rows, rows], dim=1)[:, :577].reshape(2, 3, 577),
        random_rows(6, 580)[:, 3:].unflatten(0, (2, 3)),
        random_rows(6, 577, seed=3).view(3, 2, 577).transpose(0, 1),  # no single row stride
        rows[:1].expand(6, 577).unflatten(0, (2, 3)),
    ]
    norms, again = torch.full((7, 8), -7.0, device=device).t(), torch.full((8, 7), -7.0, device=device)
    ops.streams_l2norm(streams, norms)
    for place, stream in enumerate(streams):
        ops.row_l2norm(stream, again, place)
    assert_bits_equal(norms, again)


def test_special_values(dtype, special_pairs, table) -> None:
    streams = list(special_pairs)
    norms, again = table(len(streams[0]), 2), table(len(streams[0]), 2)
    ops.streams_l2norm(streams, norms)
    for place, stream in enumerate(streams):
        ops.row_l2norm(stream, again, place)
    assert_bits_equal(norms, again)


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    width=st.integers(0, 300),
    count=st.integers(1, 5),
    column=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_random_shapes(lead: list[int], width: int, count: int, column: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    streams = [torch.randn(*lead, width).to(dtype) for _ in range(count)]
    rows = streams[0].shape[:-1].numel()
    norms, again = torch.zeros(rows, column + count), torch.zeros(rows, column + count)
    ops.streams_l2norm(streams, norms, column)
    reference.streams_l2norm(streams, again, column)
    assert_close(norms, again.double(), tolerance("norm", dtype, width))


def test_many_rows_are_shared_by_threads(random_rows, table) -> None:
    """As many that several threads have a part, which begin and end within streams."""
    streams = [random_rows(97, 4096, seed=seed) for seed in range(4)]
    norms, again = table(97, 4), table(97, 4)
    ops.streams_l2norm(streams, norms)
    for place, stream in enumerate(streams):
        ops.row_l2norm(stream, again, place)
    assert_bits_equal(norms, again)


def test_opcheck(device, dtype, random_rows, table) -> None:
    streams = [random_rows(3, 2, 33, seed=seed) for seed in range(3)]
    torch.library.opcheck(STREAMS, (streams, table(6, 5), 1))
    torch.library.opcheck(STREAMS, ([stream.transpose(0, 1) for stream in streams], table(7, 3)))


def test_compiles_without_breaks(device, random_rows, table) -> None:
    def layers(stream, norms):
        streams = [stream, stream * 2, stream * 3]
        ops.streams_l2norm(streams, norms)
        return norms + 1

    stream, eager, compiled = random_rows(3, 33), table(3, 3), table(3, 3)
    expected = layers(stream, eager)
    assert_bits_equal(torch.compile(layers, fullgraph=True, backend="aot_eager")(stream, compiled), expected)
    assert_bits_equal(compiled, eager)


def test_refuses_to_lose_a_gradient(device) -> None:
    plain, wanted = torch.ones(2, 4, device=device), torch.ones(2, 4, device=device, requires_grad=True)
    norms = torch.zeros(2, 2, device=device)
    with pytest.raises(RuntimeError, match=r"void_ext::streams_l2norm: streams\[1\]: .*requires no grad"):
        ops.streams_l2norm([plain, wanted], norms)
    ops.streams_l2norm([plain, wanted.detach()], norms)
    assert norms.tolist() == [[2.0, 2.0]] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": []}, "streams: expected at least one tensor, got none"),
        (
            {"streams": [torch.ones(())]},
            "streams[0]: expected at least one dimension, [..., D], got a tensor of none",
        ),
        ({"streams": [torch.ones(3, 8).long()]}, "streams[0]: expected float32, float16 or bfloat16, got int64"),
        (
            {"streams": [torch.ones(3, 8), torch.ones(3, 8).half()]},
            "streams[1]: expected float32 like streams[0], got float16",
        ),
        (
            {"streams": [torch.ones(3, 8), torch.ones(3, 8), torch.ones(2, 8)]},
            "streams[2]: expected shape [3, 8] like streams[0], got [2, 8]",
        ),
        ({"norms": torch.ones(3, 4).bfloat16()}, "norms: expected float32, got bfloat16"),
        ({"norms": torch.ones(2, 3, 4)}, "norms: expected two dimensions, [rows, columns], got shape [2, 3, 4]"),
        (
            {"norms": torch.ones(2, 4)},
            "norms: expected at least 3 rows, one for each row of streams[0], got shape [2, 4]",
        ),
        ({"norms": torch.ones(3, 1)}, "norms: expected at least 2 columns, one for each stream, got shape [3, 1]"),
        ({"column": 3}, "column: expected 0 to 2, where the streams' columns begin, got 3"),
        ({"column": -1}, "column: expected 0 to 2, where the streams' columns begin, got -1"),
    ],
)
def test_names_what_is_wrong_before_writing(device, changes, message) -> None:
    arguments = {"streams": [torch.ones(3, 8)] * 2, "norms": torch.zeros(3, 4), "column": 1, **changes}
    arguments["streams"] = [stream.to(device) for stream in arguments["streams"]]
    arguments["norms"] = arguments["norms"].to(device)
    before = arguments["norms"].clone()
    with pytest.raises(ValueError, match=re.escape(f"void_ext::streams_l2norm: {message}")):
        ops.streams_l2norm(**arguments)
    assert_bits_equal(arguments["norms"], before)


@pytest.mark.parametrize("place", [0, 1])
def test_the_table_is_apart_from_what_is_read(device, place) -> None:
    streams = [torch.ones(3, 8, device=device) for _ in range(2)]
    norms = streams[place][:, 2:6]
    said = rf"void_ext::streams_l2norm: streams\[{place}\]: expected memory apart from that of norms"
    with pytest.raises(ValueError, match=said):
        ops.streams_l2norm(streams, norms)
    with pytest.raises(ValueError, match="void_ext::row_l2norm: stream: expected memory apart from that of norms"):
        ops.row_l2norm(streams[place], norms, 0)
    assert bool((norms == 1.0).all())
