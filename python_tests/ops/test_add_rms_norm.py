from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from void_ext import ops, reference
from void_ext.testing import assert_bits_equal, assert_close, assert_ulp_close, tolerance

ADD_RMS = torch.ops.void_ext.add_rms_norm.default
EPS = 1e-5


def test_matches_reference(device, dtype, layout, shape, random_rows, table, only_written) -> None:
    rows, width = shape
    residual, update = layout(random_rows(*shape)), layout(random_rows(*shape, seed=1, scale=0.1))
    weight = random_rows(width, seed=2)
    norms, updates = table(rows + 2, 5), table(rows + 1, 4)
    h, normed = ops.add_rms_norm(residual, update, weight, EPS, norms, 2, updates)
    assert h.is_contiguous()
    assert normed.is_contiguous()
    again, again_updates = table(rows + 2, 5), table(rows + 1, 4)
    expected, expected_normed = reference.add_rms_norm(residual, update, weight, EPS, again, 2, again_updates)
    assert_bits_equal(h, residual + update, "h")
    assert_bits_equal(expected, h, "reference h")
    assert_close(normed, expected_normed.double(), tolerance("rms_norm", dtype, width), "normed")
    assert_close(norms, again.double(), tolerance("norm", dtype, width), "norms")
    assert_close(updates, again_updates.double(), tolerance("norm", dtype, width), "updates")
    only_written(norms, rows, 2)
    only_written(updates, rows, 1)


def test_the_add_is_add_l2norm(dtype, shape, random_rows, table) -> None:
    rows, width = shape
    residual, update = random_rows(*shape), random_rows(*shape, seed=1)
    norms, updates, plain, plain_updates = table(rows, 3), table(rows, 3), table(rows, 3), table(rows, 3)
    h, _ = ops.add_rms_norm(residual, update, random_rows(width), EPS, norms, 1, updates)
    assert_bits_equal(h, ops.add_l2norm(residual, update, plain, 1, plain_updates))
    assert_bits_equal(norms, plain)
    assert_bits_equal(updates, plain_updates)


def test_records_nothing_without_a_table(device, dtype, shape, random_rows, table) -> None:
    rows, width = shape
    residual, update = random_rows(*shape), random_rows(*shape, seed=1)
    weight = random_rows(width, seed=2)
    updates, again = table(rows, 3), table(rows, 3)
    expected = ops.add_rms_norm(residual, update, weight, EPS, table(rows, 3), 1, updates)
    for changes in (None, again):
        got = ops.add_rms_norm(residual, update, weight, EPS, None, 1, changes)
        for name, left, right in zip(("h", "normed"), got, expected, strict=True):
            assert_bits_equal(left, right, name)
    assert_bits_equal(again, updates, "updates")
    out = torch.empty_like(residual), torch.empty_like(residual)
    assert_bits_equal(ops.add_rms_norm(residual, update, weight, EPS, None, out=out)[1], expected[1], "normed, out")


def test_a_verdict_needs_the_table(device) -> None:
    rows = torch.ones(3, 8, device=device)
    active = torch.zeros(3, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"norms: expected the table that a verdict is read from .*, got None"):
        ops.add_rms_norm(rows, rows, rows[0], EPS, None, 1, alpha=0.8, active=active)


# float16 is eight times as fine as bfloat16, so the same relative error of the sum flips eight times the roundings.
@pytest.mark.parametrize(
    ("kind", "share"), [(torch.bfloat16, 2e-5), (torch.float16, 1.6e-4)], ids=["bfloat16", "float16"]
)
def test_rounds_as_llama_does(device, kind, share) -> None:
    transformers = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    for width in (576, 4096):
        norm = transformers.LlamaRMSNorm(width, eps=EPS).to(device, kind)
        norm.weight.data.normal_()
        residual, update = (
            torch.randn(512, width, device=device).to(kind),
            torch.randn(512, width, device=device).to(kind),
        )
        with torch.no_grad():
            h, normed = ops.add_rms_norm(residual, update, norm.weight, EPS, torch.empty(512, 1, device=device), 0)
            # 1 ulp of the value before the weight may be 2 of the product.
            assert_ulp_close(normed, norm(h), f"width {width}", max_ulp=2, max_share=share)


def test_large_and_small_rows(device, dtype, random_rows, table) -> None:
    """eps decides where the rows are tiny; large rows keep their direction."""
    weight = torch.ones(96, device=device, dtype=dtype)
    for scale in (1e-4, 1.0, 200.0):
        rows = random_rows(4, 96, scale=scale)
        zero = torch.zeros_like(rows)
        _, normed = ops.add_rms_norm(rows, zero, weight, EPS, table(4, 1), 0)
        exact = rows.double() / (rows.double().square().mean(-1, keepdim=True) + EPS).sqrt()
        assert_close(normed, exact, tolerance("rms_norm", dtype, 96), f"scale {scale}")


def test_special_values(dtype, special_pairs, table) -> None:
    residual, update = special_pairs
    weight = torch.ones(33, dtype=dtype, device=residual.device)
    norms, again = table(len(residual), 1), table(len(residual), 1)
    h, normed = ops.add_rms_norm(residual, update, weight, EPS, norms, 0)
    _, expected = reference.add_rms_norm(residual, update, weight, EPS, again, 0)
    assert_bits_equal(h, residual + update, "h", any_nan=True)
    assert_close(normed, expected.double(), tolerance("rms_norm", dtype, 33), "normed")


def test_zero_rows_without_eps_are_nan_as_in_torch(device, dtype, table) -> None:
    zero, weight = torch.zeros(2, 5, device=device, dtype=dtype), torch.ones(5, device=device, dtype=dtype)
    _, normed = ops.add_rms_norm(zero, zero, weight, 0.0, table(2, 1), 0)
    assert normed.isnan().all()


@pytest.mark.parametrize("width", [3, 576, 4097])
def test_a_row_has_the_same_bits_in_any_batch(width, random_rows, table) -> None:
    rows = 211
    residual, update, weight = random_rows(rows, width), random_rows(rows, width, seed=1), random_rows(width, seed=2)
    h, normed = ops.add_rms_norm(residual, update, weight, EPS, table(rows, 1), 0)
    for count in (1, 7, 64):
        for start in (0, 13, rows - count):
            part = slice(start, start + count)
            few = ops.add_rms_norm(residual[part], update[part], weight, EPS, table(count, 1), 0)
            assert_bits_equal(few[0], h[part], "h")
            assert_bits_equal(few[1], normed[part], "normed")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 300),
    pad=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_random_shapes(rows: int, width: int, pad: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    residual = torch.randn(rows, width + pad).to(dtype)[:, pad:]
    update, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    norms, again = torch.zeros(rows, 2), torch.zeros(rows, 2)
    h, normed = ops.add_rms_norm(residual, update, weight, EPS, norms, 1)
    _, expected = reference.add_rms_norm(residual, update, weight, EPS, again, 1)
    assert_bits_equal(h, residual + update)
    assert_close(normed, expected.double(), tolerance("rms_norm", dtype, width))
    assert_close(norms, again.double(), tolerance("norm", dtype, width))


def test_opcheck(device, dtype, random_rows, table) -> None:
    residual, update, weight = random_rows(3, 2, 33), random_rows(3, 2, 33, seed=1), random_rows(33)
    torch.library.opcheck(ADD_RMS, (residual, update, weight, EPS, table(6, 3), 1))
    torch.library.opcheck(ADD_RMS, (residual, update, weight, EPS, table(6, 3), 1, table(6, 3)))
    torch.library.opcheck(ADD_RMS, (residual, update, weight, EPS, None))


def test_compiles_without_breaks(device, random_rows, table) -> None:
    def layer(residual, update, weight, norms):
        h, normed = ops.add_rms_norm(residual, update, weight, EPS, norms, 1)
        return h + normed

    arguments = random_rows(3, 33), random_rows(3, 33, seed=1), random_rows(33)
    eager, compiled = table(3, 2), table(3, 2)
    expected = layer(*arguments, eager)
    assert_bits_equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(*arguments, compiled), expected)
    assert_bits_equal(compiled, eager)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_gradient_is_the_formulas(device, random_rows, table, zero_centered) -> None:
    leaves = [random_rows(3, 2, 33), random_rows(3, 2, 33, seed=1), random_rows(33, seed=2)]
    leaves = [leaf.float().requires_grad_() for leaf in leaves]
    norms, expected = table(6, 3), table(6, 3)
    h, normed = ops.add_rms_norm(*leaves, EPS, norms, 1, zero_centered=zero_centered)
    with torch.no_grad():
        sums, fused = ops.add_rms_norm(*leaves, EPS, expected, 1, zero_centered=zero_centered)
    assert_bits_equal(h.detach(), sums)
    assert_bits_equal(norms, expected)
    assert_close(normed.detach(), fused, tolerance("rms_norm", torch.float32, 33))

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    stream = wide[0] + wide[1]
    scaled = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + EPS)
    truth = scaled * (1 + wide[2] if zero_centered else wide[2])
    upstream = random_rows(3, 2, 33, seed=3).float()
    ours = torch.autograd.grad((h, normed), leaves, (upstream, upstream))
    theirs = torch.autograd.grad((stream, truth), wide, (upstream.double(), upstream.double()))
    for got, wanted in zip(ours, theirs, strict=True):
        assert_close(got, wanted.float(), tolerance("logits", torch.float32))


def test_refuses_to_lose_a_gradient(device) -> None:
    rows, norms = torch.ones(2, 4, device=device), torch.zeros(2, 1, device=device)
    weight = torch.ones(4, device=device, requires_grad=True)
    on = torch.ones(2, dtype=torch.bool, device=device)
    with pytest.raises(RuntimeError, match=r"void_ext::add_rms_norm: weight: .*requires no grad"):
        ops.add_rms_norm(rows, rows, weight, EPS, norms, 0, on=on)
    with torch.inference_mode():
        assert ops.add_rms_norm(rows, rows, weight, EPS, norms, 0)[1].shape == (2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update": torch.ones(8)}, "update: expected shape [3, 8] like residual, got [8]"),
        ({"weight": torch.ones(7)}, "weight: expected shape [8], the width of residual, got [7]"),
        ({"weight": torch.ones(1, 8)}, "weight: expected shape [8], the width of residual, got [1, 8]"),
        ({"weight": torch.ones(8).bfloat16()}, "weight: expected float32 like residual, got bfloat16"),
        ({"eps": -1e-6}, "eps: expected a finite number >= 0, got -1e-06"),
        ({"eps": float("nan")}, "eps: expected a finite number >= 0, got nan"),
        (
            {"norms": torch.ones(2, 4)},
            "norms: expected at least 3 rows, one for each row of residual, got shape [2, 4]",
        ),
        ({"column": 4}, "column: expected 0 to 3, a column of norms, got 4"),
        (
            {"updates": torch.ones(3, 4), "column": 0},
            "column: expected 1 to 4, as the update norm goes to column - 1 of updates, got 0",
        ),
    ],
)
def test_names_what_is_wrong_before_writing(device, changes, message) -> None:
    arguments = {
        "residual": torch.ones(3, 8),
        "update": torch.ones(3, 8),
        "weight": torch.ones(8),
        "eps": EPS,
        "norms": torch.zeros(3, 4),
        "column": 1,
        "updates": None,
        **changes,
    }
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    before = arguments["norms"].clone()
    with pytest.raises(ValueError, match=re.escape(f"void_ext::add_rms_norm: {message}")):
        ops.add_rms_norm(**arguments)
    assert_bits_equal(arguments["norms"], before)


def test_refuses_a_strided_weight(device) -> None:
    rows = torch.ones(3, 8, device=device)
    with pytest.raises(ValueError, match="weight: expected a contiguous tensor, got stride 2"):
        ops.add_rms_norm(rows, rows, torch.ones(16, device=device)[::2], EPS, torch.zeros(3, 1, device=device), 0)
