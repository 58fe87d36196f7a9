from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from void_ext import ops, reference
from void_ext.testing import assert_bits_equal

MASK = torch.ops.void_ext.void_mask.default


def by_the_formula(norms: Tensor, alpha: float, executed: Tensor | None = None) -> Tensor:
    """The definition in numpy float32: no running range, every threshold from the list of earlier deltas."""
    table = norms.cpu().numpy()
    ran = np.ones((table.shape[0], table.shape[1] - 1), dtype=bool) if executed is None else executed.cpu().numpy()
    active = np.zeros_like(ran)
    with np.errstate(all="ignore"):
        for token, row in enumerate(table):
            delta = row[1:] - row[:-1]
            for layer in np.flatnonzero(ran[token]):
                earlier = delta[:layer][ran[token][:layer]]
                threshold = np.float32(alpha) * (earlier.max() - earlier.min()) if len(earlier) else np.float32(0)
                active[token, layer] = not (delta[layer] < threshold)
    return torch.from_numpy(active).to(norms.device)


def streams(tokens: int, layers: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(tokens, layers + 1, generator=generator) * 3 + 1
    return steps.cumsum(1).abs().to(device)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.8, 1.0, 3.5])
@pytest.mark.parametrize("layers", [0, 1, 2, 3, 30, 31, 80, 200])
@pytest.mark.parametrize("tokens", [0, 1, 7, 600])
def test_matches_formula_and_reference(device, tokens, layers, alpha) -> None:
    norms = streams(tokens, layers, device)
    active = ops.void_mask(norms, alpha)
    assert active.shape == (tokens, layers)
    assert active.dtype == torch.bool
    assert active.is_contiguous()
    assert_bits_equal(active, by_the_formula(norms, alpha))
    assert_bits_equal(reference.void_mask(norms, alpha), active, "reference")
    executed = torch.rand(tokens, layers, generator=torch.Generator().manual_seed(1)).to(device) < 0.7
    active = ops.void_mask(norms, alpha, executed)
    assert_bits_equal(active, by_the_formula(norms, alpha, executed))
    assert_bits_equal(reference.void_mask(norms, alpha, executed), active, "reference")


def test_tells_voids_from_active_layers(device) -> None:
    """Deltas 4, 1, -1, 3, 4 at alpha 0.8: the thresholds are 0, 0, 2.4, 4, 4."""
    norms = torch.tensor([[10.0, 14.0, 15.0, 14.0, 17.0, 21.0]], device=device)
    assert ops.void_mask(norms, 0.8).tolist() == [[True, True, False, False, True]]


def test_equality_is_active(device) -> None:
    """Deltas 1, 0, then 1 against a range of 1 at alpha 1; and just below it; and zero against zero."""
    norms = torch.tensor([[0.0, 1.0, 1.0, 2.0], [0.0, 1.0, 1.0, 2.0 - 2**-23], [5.0, 5.0, 5.0, 5.0]], device=device)
    assert ops.void_mask(norms, 1.0)[:, 2].tolist() == [True, False, True]
    assert ops.void_mask(norms, 1.0)[2].tolist() == [True, True, True]


def test_the_first_two_layers_have_threshold_zero(device) -> None:
    norms = torch.tensor([[5.0, 4.0, 3.0], [5.0, 6.0, 6.0], [5.0, 6.0, 5.0]], device=device)
    assert ops.void_mask(norms, 100.0).tolist() == [[False, False], [True, True], [True, False]]


@pytest.mark.parametrize("where", range(6))
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_nan_and_infinity(device, where, value, alpha) -> None:
    norms = streams(4, 5, device)
    norms[2, where] = value
    active = ops.void_mask(norms, alpha)
    assert_bits_equal(active, by_the_formula(norms, alpha))
    assert_bits_equal(reference.void_mask(norms, alpha), active, "reference")
    if math.isnan(value):  # its own delta, and every later one, since it stays in the range
        assert active[2, max(where - 1, 0) :].all()


def test_layers_that_did_not_run_leave_no_trace(device) -> None:
    """Removing a layer's column and marking it unexecuted give the same verdicts, where its delta is 0."""
    norms = streams(50, 12, device)
    dropped = torch.cat([norms[:, :6], norms[:, 5:]], dim=1)
    executed = torch.ones(50, 13, dtype=torch.bool, device=device)
    executed[:, 5] = False
    active = ops.void_mask(dropped, 0.8, executed)
    assert not active[:, 5].any()
    assert_bits_equal(torch.cat([active[:, :5], active[:, 6:]], dim=1), ops.void_mask(norms, 0.8))


def test_nothing_executed(device) -> None:
    norms = streams(3, 4, device)
    assert not ops.void_mask(norms, 0.8, torch.zeros(3, 4, dtype=torch.bool, device=device)).any()


def test_strided_tables(device) -> None:
    wide = streams(9, 40, device)
    executed = torch.rand(9, 60, generator=torch.Generator().manual_seed(2)).to(device) < 0.5
    part, ran = wide[::2, 3:17], executed[::2, 5:18]
    assert_bits_equal(ops.void_mask(part, 0.8, ran), ops.void_mask(part.contiguous(), 0.8, ran.contiguous()))


def test_a_token_has_the_same_verdict_in_any_batch(device) -> None:
    norms = streams(4000, 31, device)
    active = ops.void_mask(norms, 0.3)
    for token in (0, 1, 1999, 3999):
        assert_bits_equal(ops.void_mask(norms[token : token + 1], 0.3), active[token : token + 1])


@settings(max_examples=150, deadline=None)
@given(
    data=st.lists(
        st.lists(st.one_of(st.integers(0, 6), st.floats(0, 1e6, width=32), st.just(math.nan)), min_size=6, max_size=6),
        min_size=1,
        max_size=4,
    ),
    alpha=st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(0, 10)),
    ran=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_any_table(data: list[list[float]], alpha: float, ran: list[bool]) -> None:
    """Small integers make ties and equal ranges common."""
    norms = torch.tensor(data, dtype=torch.float32)
    executed = torch.tensor([ran] * len(data))
    assert_bits_equal(ops.void_mask(norms, alpha), by_the_formula(norms, alpha))
    assert_bits_equal(ops.void_mask(norms, alpha, executed), by_the_formula(norms, alpha, executed))


def test_opcheck(device) -> None:
    norms = streams(3, 5, device)
    torch.library.opcheck(MASK, (norms, 0.8))
    torch.library.opcheck(MASK, (norms, 0.8, torch.ones(3, 5, dtype=torch.bool, device=device)))


def test_compiles_without_breaks(device) -> None:
    compiled = torch.compile(lambda n: ops.void_mask(n, 0.8).sum(0), fullgraph=True, backend="aot_eager")
    norms = streams(6, 5, device)
    assert_bits_equal(compiled(norms), ops.void_mask(norms, 0.8).sum(0))


def test_refuses_to_lose_a_gradient(device) -> None:
    with pytest.raises(RuntimeError, match=r"void_ext::void_mask: norms: .*requires no grad"):
        ops.void_mask(torch.ones(2, 4, device=device, requires_grad=True), 0.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norms": torch.ones(4)}, "norms: expected two dimensions, [rows, columns], got shape [4]"),
        ({"norms": torch.ones(2, 5).half()}, "norms: expected float32, got float16"),
        ({"norms": torch.ones(2, 0)}, "norms: expected at least one column, the norm before layer 0, got shape [2, 0]"),
        ({"norms": torch.ones(5, 2).t()}, "norms: expected neighbouring columns (stride 1), got strides [1, 2]"),
        ({"alpha": -0.1}, "alpha: expected a finite float32 >= 0, got -0.1"),
        ({"alpha": math.nan}, "alpha: expected a finite float32 >= 0, got nan"),
        ({"alpha": math.inf}, "alpha: expected a finite float32 >= 0, got inf"),
        ({"alpha": 1e39}, "alpha: expected a finite float32 >= 0, got 1e+39"),
        ({"executed": torch.ones(2, 4)}, "executed: expected bool, got float32"),
        (
            {"executed": torch.ones(2, 5).bool()},
            "executed: expected shape [2, 4], a column less than norms, got [2, 5]",
        ),
        (
            {"executed": torch.ones(3, 4).bool()},
            "executed: expected shape [2, 4], a column less than norms, got [3, 4]",
        ),
        (
            {"executed": torch.ones(4, 2).bool().t()},
            "executed: expected neighbouring columns (stride 1), got stride 2",
        ),
    ],
)
def test_names_what_is_wrong(device, changes, message) -> None:
    arguments = {"norms": torch.ones(2, 5), "alpha": 0.8, "executed": None, **changes}
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(f"void_ext::void_mask: {message}")):
        ops.void_mask(**arguments)
