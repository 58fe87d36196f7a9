from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from void_ext import ops, reference
from void_ext.testing import assert_bits_equal

SELECT = torch.ops.void_ext.exit_select.default


def streams(tokens: int, layers: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    steps = torch.randn(tokens, layers + 1, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    return steps.cumsum(1).abs().to(device)


def test_matches_reference_and_mask(device, dtype, layout, shape, random_rows) -> None:
    rows, _ = shape
    norms = streams(rows + 2, 9, device)
    for layer in (0, 1, 5, 8):
        kept, stream = random_rows(*shape), layout(random_rows(*shape, seed=1))
        expected = kept.clone()
        reference.exit_select(expected, stream, norms, layer, 0.8)
        before = kept.clone()
        assert ops.exit_select(kept, stream, norms, layer, 0.8) is None
        assert_bits_equal(kept, expected, f"layer {layer}")
        active = ops.void_mask(norms, 0.8)[:rows, layer]
        assert_bits_equal(kept[active], stream[active], "active rows")
        assert_bits_equal(kept[~active], before[~active], "other rows")


def test_keeps_each_row_at_its_last_active_layer(device, dtype, random_rows) -> None:
    layers, rows = 12, 40
    norms = streams(rows, layers, device)
    outputs = [random_rows(rows, 33, seed=layer) for layer in range(layers + 1)]
    kept = outputs[0].clone()
    for layer in range(layers):
        ops.exit_select(kept, outputs[layer + 1], norms, layer, 0.8)
    active = ops.void_mask(norms, 0.8)
    for row in range(rows):
        last = max((layer for layer in range(layers) if active[row, layer]), default=-1)
        assert_bits_equal(kept[row], outputs[last + 1][row], f"row {row}, last active layer {last}")


def test_only_reads_norms_up_to_its_layer(device) -> None:
    norms = streams(20, 6, device)
    kept, other = torch.zeros(20, 3, device=device), torch.zeros(20, 3, device=device)
    stream = torch.ones(20, 3, device=device)
    ops.exit_select(kept, stream, norms, 2, 0.8)
    norms[:, 4:] = math.nan
    ops.exit_select(other, stream, norms, 2, 0.8)
    assert_bits_equal(kept, other)


def test_copies_bits(device, dtype, special_pairs) -> None:
    """Infinities, NaN payloads, subnormals, signed zeros: a product with a mask would make NaN or lose them."""
    stream, kept = special_pairs
    rising = torch.tensor([[0.0, 1.0]], device=device).expand(len(stream), 2).contiguous()
    falling = rising.flip(1).contiguous()
    expected = kept.clone()
    ops.exit_select(kept, stream, falling, 0, 0.8)
    assert_bits_equal(kept, expected)
    ops.exit_select(kept, stream, rising, 0, 0.8)
    assert_bits_equal(kept, stream.contiguous())


def test_writes_into_rows_of_a_larger_tensor(device, dtype, random_rows) -> None:
    wide = random_rows(6, 3, 50)
    before, stream = wide.clone(), random_rows(6, 3, 40, seed=1)
    norms = torch.tensor([[0.0, 1.0]], device=device).repeat(18, 1)
    ops.exit_select(wide[..., 7:47], stream, norms, 0, 0.8)
    assert_bits_equal(wide[..., 7:47].contiguous(), stream)
    assert_bits_equal(wide[..., :7].contiguous(), before[..., :7].contiguous())
    assert_bits_equal(wide[..., 47:].contiguous(), before[..., 47:].contiguous())


def test_a_stream_onto_itself(device, random_rows) -> None:
    rows = random_rows(5, 40)
    before = rows.clone()
    ops.exit_select(rows, rows, streams(5, 2, device), 1, 0.8)
    assert_bits_equal(rows, before)


def test_a_stream_beside_the_kept_rows(device, random_rows) -> None:
    wide = random_rows(5, 40)
    stream, norms = wide[:, 20:].clone(), streams(5, 2, device)
    expected = wide[:, :20].clone()
    reference.exit_select(expected, stream, norms, 1, 0.8)
    ops.exit_select(wide[:, :20], wide[:, 20:], norms, 1, 0.8)
    assert_bits_equal(wide[:, :20].contiguous(), expected)
    assert_bits_equal(wide[:, 20:].contiguous(), stream)


@pytest.mark.parametrize(
    "make",
    [
        lambda wide: (wide[:, :16], wide[:, 8:24]),
        lambda wide: (wide[1:], wide[:-1]),
        lambda wide: (wide[:-1], wide[1:]),
        lambda wide: (wide.view(-1)[:64].view(4, 16), wide.view(-1)[:128].view(4, 32)[:, :16]),
        lambda wide: (wide.view(-1)[:64].view(4, 16), wide[:1, :16].expand(4, 16)),
    ],
    ids=["half a row", "a row before", "a row further", "other strides", "one row for all"],
)
def test_refuses_a_stream_that_overlaps_the_kept_rows(device, make) -> None:
    """What a row reads, another might have written already."""
    wide = torch.zeros(5, 32, device=device)
    kept, stream = make(wide)
    norms = torch.tensor([[0.0, 1.0]], device=device).repeat(5, 1)
    message = (
        r"exit_select: stream: expected memory apart from that of kept, which is written to, got rows that overlap"
    )
    with pytest.raises(ValueError, match=message):
        ops.exit_select(kept, stream, norms, 0, 0.8)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(0, 70),
    layer=st.integers(0, 4),
    alpha=st.floats(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_random_shapes(rows: int, width: int, layer: int, alpha: float, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    norms = torch.randint(0, 5, (rows, 6)).float()
    kept, stream = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    expected = kept.clone()
    reference.exit_select(expected, stream, norms, layer, alpha)
    ops.exit_select(kept, stream, norms, layer, alpha)
    assert_bits_equal(kept, expected)


def test_opcheck(device, dtype, random_rows) -> None:
    torch.library.opcheck(SELECT, (random_rows(3, 2, 33), random_rows(3, 2, 33, seed=1), streams(6, 4, device), 2, 0.8))


def test_compiles_without_breaks(device, random_rows) -> None:
    def layer(kept, stream, norms):
        ops.exit_select(kept, stream * 2, norms, 1, 0.8)
        return kept + 1

    stream, norms = random_rows(6, 33, seed=1), streams(6, 4, device)
    eager, compiled = random_rows(6, 33), random_rows(6, 33)
    expected = layer(eager, stream, norms)
    assert_bits_equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(compiled, stream, norms), expected)
    assert_bits_equal(compiled, eager)


def test_refuses_to_lose_a_gradient(device) -> None:
    stream = torch.ones(2, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"void_ext::exit_select: stream: .*requires no grad"):
        ops.exit_select(torch.zeros(2, 4, device=device), stream, torch.zeros(2, 2, device=device), 0, 0.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": torch.zeros(())}, "kept: expected at least one dimension, [..., D], got a tensor of none"),
        ({"kept": torch.zeros(3, 8).double()}, "kept: expected float32, float16 or bfloat16, got float64"),
        ({"stream": torch.ones(3, 7)}, "stream: expected shape [3, 8] like kept, got [3, 7]"),
        ({"stream": torch.ones(3, 8).half()}, "stream: expected float32 like kept, got float16"),
        ({"norms": torch.ones(2, 5)}, "norms: expected at least 3 rows, one for each row of kept, got shape [2, 5]"),
        (
            {"layer": 4},
            "layer: expected 0 to 3, a layer with norms before and after it in norms of shape [3, 5], got 4",
        ),
        (
            {"layer": -1},
            "layer: expected 0 to 3, a layer with norms before and after it in norms of shape [3, 5], got -1",
        ),
        ({"alpha": -1.0}, "alpha: expected a finite float32 >= 0, got -1"),
    ],
)
def test_names_what_is_wrong_before_writing(device, changes, message) -> None:
    arguments = {
        "kept": torch.zeros(3, 8),
        "stream": torch.ones(3, 8),
        "norms": torch.arange(15.0).reshape(3, 5),
        "layer": 1,
        "alpha": 0.8,
        **changes,
    }
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(f"void_ext::exit_select: {message}")):
        ops.exit_select(**arguments)
    assert arguments["kept"].count_nonzero() == 0


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda: torch.zeros(8, 3).t(), "got shape [3, 8] with strides [1, 3]"),
        (lambda: torch.zeros(2, 3, 8).transpose(0, 1), "got shape [3, 2, 8] with strides [8, 24, 1]"),
        (lambda: torch.zeros(1, 8).expand(3, 8), "got shape [3, 8] with strides [0, 1]"),
        (lambda: torch.zeros(30).as_strided((3, 8), (4, 1)), "got shape [3, 8] with strides [4, 1]"),
    ],
)
def test_refuses_to_write_where_no_copy_can_stand_in(kept, message) -> None:
    target = kept()
    norms = torch.tensor([[0.0, 1.0]]).repeat(6, 1)
    with pytest.raises(ValueError, match=r"kept: is written to, so expected rows .*" + re.escape(message)):
        ops.exit_select(target, torch.ones(target.shape), norms, 0, 0.8)
    assert target.count_nonzero() == 0
