"""add_l2norm and add_rms_norm for chosen rows, with a verdict on the layer, into the caller's tensors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from void_ext import ops, reference
from void_ext.testing import assert_bits_equal, assert_close, assert_ulp_close, tolerance

EPS, ALPHA, COLUMN = 1e-5, 0.8, 4


@pytest.fixture
def history(device):
    """history(rows, columns): norms of layers before, as a residual stream has them: growing, by chance."""

    def make(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(rows, columns + 4, generator=generator).cumsum(1) + 20.0).to(device)[:, 3 : 3 + columns]

    return make


@pytest.fixture
def rows_of(device):
    def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
        return (torch.randn(shape, generator=generator) * 6).to(device, dtype)

    return make


def flags(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6).to(device)


@pytest.mark.parametrize("fused", [False, True], ids=["add_l2norm", "add_rms_norm"])
@pytest.mark.parametrize("some_off", [False, True], ids=["all", "some"])
def test_matches_reference(device, dtype, layout, shape, random_rows, table, history, fused, some_off) -> None:
    rows, width = shape
    residual, update, kept = (layout(random_rows(*shape, seed=seed)) for seed in range(3))
    if not kept.is_contiguous() and width > 1 and kept.stride(-1) != 1:
        kept = kept.contiguous()  # it is written to
    before_kept, weight = kept.clone(), random_rows(width, seed=4)
    norms = history(rows, 8)
    choice = {
        "on": flags(rows, device=device) if some_off else None,
        "alpha": ALPHA,
        "executed": flags(rows, COLUMN, device=device, seed=1),
        "active": torch.ones(rows, dtype=torch.bool, device=device),
        "kept": kept,
    }
    updates, again_updates, again = table(rows, 7), table(rows, 7), norms.clone()
    expected = {**choice, "active": choice["active"].clone(), "kept": kept.clone()}
    if fused:
        h, normed = ops.add_rms_norm(residual, update, weight, EPS, norms, COLUMN, updates, **choice)
        want, want_normed = reference.add_rms_norm(
            residual, update, weight, EPS, again, COLUMN, again_updates, **expected
        )
        assert_close(normed, want_normed.double(), tolerance("rms_norm", dtype, width), "normed")
    else:
        h = ops.add_l2norm(residual, update, norms, COLUMN, updates, **choice)
        want = reference.add_l2norm(residual, update, again, COLUMN, again_updates, **expected)
    assert_bits_equal(h, want, "h")
    assert_close(norms, again.double(), tolerance("norm", dtype, width), "norms")
    assert_close(updates, again_updates.double(), tolerance("norm", dtype, width), "updates")
    # A norm in another last bit may tip the scales: the verdict is that of the rule on the norms that were written.
    ran = torch.ones(rows, dtype=torch.bool, device=device) if choice["on"] is None else choice["on"]
    before = torch.cat([choice["executed"][:, : COLUMN - 1], ran[:, None]], 1)
    verdict = ops.void_mask(norms[:, : COLUMN + 1].contiguous(), ALPHA, before)[:, -1]
    assert torch.equal(choice["active"], verdict)
    assert_bits_equal(kept, torch.where(verdict[:, None], h, before_kept), "kept")


def test_some_rows_are_active_and_some_are_not(device, rows_of, history) -> None:
    """What the test above relies on."""
    active = torch.empty(64, dtype=torch.bool, device=device)
    ops.add_l2norm(rows_of(64, 16), rows_of(64, 16, seed=1), history(64, 8), COLUMN, alpha=ALPHA, active=active)
    assert 0 < int(active.sum()) < 64


@pytest.mark.parametrize("fused", [False, True], ids=["add_l2norm", "add_rms_norm"])
def test_rows_that_are_off_read_no_update(device, rows_of, fused) -> None:
    residual, update, on = rows_of(9, 577), rows_of(9, 577, seed=1), flags(9, device=device)
    residual[~on, 0] = -0.0
    update[~on] = torch.nan
    norms, updates = torch.empty(9, 2, device=device), torch.empty(9, 1, device=device)
    if fused:
        h, normed = ops.add_rms_norm(residual, update, residual[0], EPS, norms, 1, updates, on=on)
        assert not bool(normed.isnan().any())
    else:
        h = ops.add_l2norm(residual, update, norms, 1, updates, on=on)
    assert_bits_equal(h, ops.keep_rows(residual, update, on))
    assert bool((updates[~on] == 0).all())
    column = torch.empty(9, 1, device=device)
    ops.row_l2norm(h, column, 0)
    assert_bits_equal(norms[:, 1:].contiguous(), column)


def test_the_flags_may_be_the_verdict(device, rows_of, history) -> None:
    """Rows that were void once stay off, with nothing asked of the device."""
    residual, update, norms = rows_of(32, 40), rows_of(32, 40, seed=1), history(32, 8)
    on, active = flags(32, device=device), torch.empty(32, dtype=torch.bool, device=device)
    ops.add_l2norm(residual, update, norms.clone(), COLUMN, on=on, alpha=ALPHA, active=active)
    ops.add_l2norm(residual, update, norms, COLUMN, on=on, alpha=ALPHA, active=on)
    assert torch.equal(on, active)


@pytest.mark.parametrize("width", [40, 577, 4096])
@pytest.mark.parametrize("same", ["neither", "residual", "update"])
def test_into_the_callers_tensors(device, dtype, width, same, rows_of) -> None:
    residual, update = rows_of(5, width, dtype=dtype), rows_of(5, width, seed=1, dtype=dtype)
    weight, norms, again = rows_of(width, dtype=dtype), *(torch.empty(5, 2, device=device) for _ in range(2))
    h, normed = ops.add_rms_norm(residual, update, weight, EPS, norms, 1)
    wide = torch.full((5, width + 3), 7.0, device=device, dtype=dtype)
    out = {"residual": residual, "update": update, "neither": wide[:, 1 : 1 + width]}[same]
    target = torch.full_like(h, torch.nan)
    got = ops.add_rms_norm(residual, update, weight, EPS, again, 1, out=(out, target))
    assert got[0] is out
    assert got[1] is target
    assert_bits_equal(out, h, "h")
    assert_bits_equal(target, normed, "normed")
    assert_bits_equal(again[:, 1:].contiguous(), norms[:, 1:].contiguous(), "norms")
    if same == "neither":
        assert bool((wide[:, 0] == 7).all() and (wide[:, 1 + width :] == 7).all())


def test_large_rows_past_the_caches(device, dtype) -> None:
    """As large as the CPU kernel writes around its caches: 16 MiB."""
    residual, update = (
        torch.randn(1, 4096, device=device).to(dtype).expand(4097, 4096),
        torch.randn(1, 4096, device=device).to(dtype).expand(4097, 4096),
    )
    weight, norms = torch.randn(4096, device=device).to(dtype), torch.empty(4097, 1, device=device)
    h, normed = ops.add_rms_norm(residual, update, weight, EPS, norms, 0)
    few, few_normed = ops.add_rms_norm(residual[:1], update[:1], weight, EPS, torch.empty(1, 1, device=device), 0)
    assert_bits_equal(h, few.expand(4097, 4096).contiguous())
    assert_bits_equal(normed, few_normed.expand(4097, 4096).contiguous())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_kind", ["same", "float32"])
@pytest.mark.parametrize("width", [7, 64, 577, 4097])
def test_rounds_as_gemma_does(device, kind, weight_kind, width) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    torch.manual_seed(width)
    norm = GemmaRMSNorm(width, eps=EPS).to(device, kind if weight_kind == "same" else torch.float32)
    norm.weight.data.normal_(std=0.3)
    residual, update = (torch.randn(64, width, device=device).to(kind) for _ in range(2))
    with torch.no_grad():
        h, normed = ops.add_rms_norm(
            residual, update, norm.weight, EPS, torch.empty(64, 1, device=device), 0, zero_centered=True
        )
        expected = norm(h)
        plain = ops.add_rms_norm(residual, update, norm.weight, EPS, torch.empty(64, 1, device=device), 0)[1]
    assert normed.dtype == expected.dtype == kind
    if kind == torch.float32:
        assert_close(normed, expected.double(), tolerance("rms_norm", kind, width))
    else:
        assert_ulp_close(normed, expected, max_ulp=1, max_share=5e-4)
    assert not torch.allclose(plain, expected, atol=0.1)


@pytest.mark.parametrize("width", [64, 577])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_weight_beside_narrow_rows(device, kind, width, table) -> None:
    torch.manual_seed(0)
    residual, update = (torch.randn(64, width, device=device).to(kind) for _ in range(2))
    weight = torch.randn(width, device=device)
    _, normed = ops.add_rms_norm(residual, update, weight, EPS, table(64, 1), 0)
    _, expected = reference.add_rms_norm(residual, update, weight, EPS, table(64, 1), 0)
    assert normed.dtype == kind
    assert_ulp_close(normed, expected, max_ulp=2, max_share=5e-4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    zero_centered=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_random_shapes(rows: int, width: int, dtype: torch.dtype, zero_centered: bool, seed: int) -> None:
    torch.manual_seed(seed)
    residual, update, kept = (torch.randn(rows, width).to(dtype) for _ in range(3))
    weight, on = torch.randn(width), torch.rand(rows) < 0.5
    norms, active = torch.rand(rows, 3).cumsum(1), torch.empty(rows, dtype=torch.bool)
    expected_norms, expected_active, expected_kept = norms.clone(), active.clone(), kept.clone()
    verdict = {"on": on, "alpha": 0.5}
    h, normed = ops.add_rms_norm(
        residual, update, weight, EPS, norms, 2, None, zero_centered, active=active, kept=kept, **verdict
    )
    want, want_normed = reference.add_rms_norm(
        residual,
        update,
        weight,
        EPS,
        expected_norms,
        2,
        None,
        zero_centered,
        active=expected_active,
        kept=expected_kept,
        **verdict,
    )
    assert_bits_equal(h, want)
    assert_close(normed, want_normed.double(), tolerance("rms_norm", dtype, width))
    close = (norms[:, 2] - expected_norms[:, 2]).abs() > 0
    assert torch.equal(active[~close], expected_active[~close])
    same = active == expected_active
    assert_bits_equal(kept[same], expected_kept[same])


def test_opcheck(device, dtype, rows_of, table) -> None:
    rows = [rows_of(3, 2, 33, seed=seed, dtype=dtype) for seed in range(5)]
    on, executed = flags(6, device=device), flags(6, 3, device=device)
    active = torch.zeros(6, dtype=torch.bool, device=device)
    choice = (table(6, 3).contiguous(), on, 0.8, executed, active, rows[2])
    into = torch.ops.void_ext.add_l2norm.into
    torch.library.opcheck(into, (*rows[:2], table(6, 4), 1, *choice, rows[3]))
    torch.library.opcheck(into, (*rows[:2], table(6, 4), 1, None, None, 0.0, None, None, None, rows[3]))
    weight = rows_of(33, dtype=dtype)
    into = torch.ops.void_ext.add_rms_norm.into
    torch.library.opcheck(
        into, (*rows[:2], weight, EPS, table(6, 4), 1, choice[0], True, *choice[1:], rows[3], rows[4])
    )


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on the device, one that repeats its first row doing so there too; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device) if value.stride(0) else value[:1].to(device).expand_as(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on": torch.ones(2, dtype=torch.bool)}, "on: expected shape [3], a flag for each row of residual, got [2]"),
        ({"active": torch.ones(3)}, "active: expected bool, got float32"),
        (
            {"active": torch.ones(1, dtype=torch.bool).expand(3)},
            "active: is written to, so expected a flag of its own for each row, got stride 0",
        ),
        ({"alpha": None}, "alpha: expected a number beside active or kept, got None"),
        ({"active": None}, "alpha: expected active or kept beside it, which its verdict goes to"),
        ({"alpha": -1.0}, "alpha: expected a finite float32 >= 0, got -1"),
        ({"column": 0}, "column: expected 1 to 3, as a verdict on a layer needs the norm before it too, got 0"),
        ({"kept": torch.ones(3, 7)}, "kept: expected shape [3, 8] like residual, got [3, 7]"),
        ({"kept": torch.ones(1, 8).expand(3, 8)}, "kept: is written to, so expected rows that share no element"),
        ({"executed": torch.ones(3, 0, dtype=torch.bool)}, "executed: expected at least 3 rows of the 1 layers before"),
        ({"executed": torch.ones(3, 1)}, "executed: expected bool, got float32"),
        ({"out": torch.ones(3, 8).half()}, "out: expected float32 like residual, got float16"),
        ({"out": torch.ones(1, 8).expand(3, 8)}, "out: is written to, so expected rows that share no element"),
    ],
)
def test_names_what_is_wrong_before_writing(device, changes, message) -> None:
    arguments = {
        "residual": torch.ones(3, 8),
        "update": torch.ones(3, 8),
        "norms": torch.zeros(3, 4),
        "column": 2,
        "alpha": 0.8,
        "active": torch.ones(3, dtype=torch.bool),
        **changes,
    }
    arguments = {name: moved(value, device) for name, value in arguments.items()}
    before = arguments["norms"].clone()
    with pytest.raises(ValueError, match=re.escape(f"void_ext::add_l2norm: {message}")):
        ops.add_l2norm(**arguments)
    assert_bits_equal(arguments["norms"], before)


def test_refuses_memory_that_is_read_and_written(device) -> None:
    memory, norms = torch.zeros(6, 8, device=device), torch.zeros(3, 2, device=device)
    other, third = torch.zeros(3, 8, device=device), torch.zeros(3, 8, device=device)
    apart = "expected memory apart from that of"
    with pytest.raises(ValueError, match=rf"residual: {apart} out, which is written to, got rows that overlap it"):
        ops.add_l2norm(memory[:3], other, norms, 0, out=memory[1:4])
    with pytest.raises(ValueError, match=rf"update: {apart} normed, which is written to, got the same rows"):
        ops.add_rms_norm(memory[:3], other, other[0].clone(), EPS, norms, 0, out=(third, other))
    with pytest.raises(ValueError, match=rf"out: {apart} normed"):
        ops.add_rms_norm(memory[:3], other, other[0].clone(), EPS, norms, 0, out=(third, third))
    with pytest.raises(ValueError, match=rf"weight: {apart} out"):
        ops.add_rms_norm(memory[:3], other, third[1], EPS, norms, 0, out=(third, memory[3:]))
    with pytest.raises(ValueError, match=rf"norms: {apart} out"):
        ops.add_l2norm(memory[:3], other, memory[3:], 0, out=memory[3:])
    active = torch.zeros(3, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=rf"kept: {apart} out"):
        ops.add_l2norm(memory[:3], other, norms, 1, alpha=0.8, active=active, kept=third, out=third)
    both = torch.zeros(4, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=rf"on: {apart} active"):
        ops.add_l2norm(memory[:3], other, norms, 1, on=both[:3], alpha=0.8, active=both[1:])
    assert not bool(norms.any())
