"""PromptPlan: what a response goes without is what the definition makes of its prompt."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from python_tests.skip.histories import DEFAULT, LAYERS, SIGNALS, expected_rows, history
from void_ext import Action, History, PromptPlan, VoidPlan
from void_ext.policies import check_decision


def skipped(plan: Any, rows: int) -> list[list[bool]]:
    """Which layers a plan's response goes without, after a look at everything else it must say."""
    assert isinstance(plan, VoidPlan)
    assert plan.prompt.is_dense
    found = []
    for row in range(rows):
        phase = plan.response.row(row)
        assert all(
            (a, m) in ((Action.RUN, Action.RUN), (Action.PROJECT, Action.SKIP))
            for a, m in zip(phase.attention, phase.mlp, strict=True)
        )
        found.append([action == Action.SKIP for action in phase.mlp])
    return found


@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("bounds", [{}, {"budget": 2}, {"budget": 3.5, "at_least": 3}, {"at_least": 4}, {"budget": 0}])
def test_prompt_plan_is_the_definition(granularity: str, signal: str, bounds: dict[str, float]) -> None:
    if signal != "delta":
        bounds = {"budget": LAYERS, **bounds}
    for seed, alpha in itertools.product(range(4), (0.0, 0.1, 0.5)):
        past = history(seed=seed, response=2)
        policy = PromptPlan(alpha, granularity, signal, **bounds)
        limits = {"most": math.floor(bounds["budget"]) if "budget" in bounds else None}
        limits["least"] = math.ceil(bounds.get("at_least", 0))
        expected = expected_rows(past, granularity, range(7), signal=signal, alpha=alpha, **limits)
        plan = policy.decide(past, "response")
        assert skipped(plan, past.rows) == expected, (seed, alpha)
        check_decision(plan, past.rows, LAYERS, by_row=policy.by_row)
        assert (plan.rows is None) == all(row == expected[0] for row in expected)
        if granularity != "batch":
            assert not any(expected[2]), "a row without a real token skips nothing"


def test_choices_of_the_test_above_are_not_trivial() -> None:
    for granularity in ("token", "sequence", "batch"):
        found = {
            tuple(map(tuple, expected_rows(history(seed=seed), granularity, range(7), alpha=0.1))) for seed in range(4)
        }
        assert len(found) >= 3
        assert any(any(row) for rows in found for row in rows)


def test_prompt_plan_keeps_the_prompt_dense() -> None:
    policy = PromptPlan()
    assert policy.decide(None, "prompt") is None
    again = policy.decide(history(), "prompt")  # a prompt that continues on the same cache
    assert again == VoidPlan.dense(LAYERS)
    assert (policy.needs_updates, policy.every_token, policy.by_row, policy.halts) == (False, False, True, False)
    assert PromptPlan(signal="cosine", budget=2).needs_updates
    assert not PromptPlan(signal="abs_delta", budget=2).needs_updates
    assert not PromptPlan(granularity="batch").by_row


def test_layers_that_did_not_run_are_not_judged() -> None:
    """A second turn: half of what is prompt now went without layers 3 and 5."""
    for seed, granularity, signal in itertools.product(range(4), ("token", "sequence", "batch"), SIGNALS):
        past = history(seed=seed, prompt=8)
        past.executed[:, 4:, 3] = past.executed[:, 4:, 5] = False
        past.norms[:, 4:, 4], past.norms[:, 4:, 6] = past.norms[:, 4:, 3], past.norms[:, 4:, 5]
        expected = expected_rows(past, granularity, range(8), signal=signal, alpha=0.1, most=2)
        found = PromptPlan(0.1, granularity, signal, budget=2).decide(past, "response")
        assert skipped(found, past.rows) == expected
        # A layer that never ran runs: nothing speaks against it.
        past.executed[..., 4] = False
        found = PromptPlan(0.1, granularity, signal, budget=2, at_least=2).decide(past, "response")
        assert not any(row[4] for row in skipped(found, past.rows))


def test_padding_may_hold_anything() -> None:
    past, clean = history(), history()
    assert past.updates is not None
    for value in (math.nan, math.inf, 1e30):
        past.norms[~past.mask] = value
        past.updates[~past.mask] = value
        for granularity, signal in itertools.product(("token", "sequence", "batch"), SIGNALS):
            policy = PromptPlan(0.1, granularity, signal, budget=3)
            assert policy.decide(past, "response") == policy.decide(clean, "response")


def test_nan_norms_are_active() -> None:
    for granularity, signal in itertools.product(("token", "sequence", "batch"), SIGNALS):
        past = history(rows=1)
        past.norms[0, :, 4] = math.nan  # the norm behind layer 3 and before layer 4
        policy = PromptPlan(0.1, granularity, signal, budget=LAYERS, at_least=3)
        row = skipped(policy.decide(past, "response"), 1)[0]
        assert not row[3]
        assert not row[4]
        past.norms[:] = math.nan
        assert policy.decide(past, "response").is_dense


def test_rows_are_judged_alone() -> None:
    past = history(rows=3, padded=False)
    for granularity, signal in itertools.product(("token", "sequence"), SIGNALS):
        policy = PromptPlan(0.1, granularity, signal, budget=2)
        plan = policy.decide(past, "response")
        for row in range(3):
            assert past.updates is not None
            tables = (table[row : row + 1] for table in (past.norms, past.executed, past.mask, past.updates))
            assert policy.decide(History(*tables, past.phases), "response") == plan.row(row)


def test_prompt_plan_refuses() -> None:
    past = history()
    past.updates = None
    with pytest.raises(ValueError, match=r"history: signal 'cosine' needs the norms of updates, got none"):
        PromptPlan(signal="cosine", budget=2).decide(past, "response")
    PromptPlan(signal="abs_delta", budget=2).decide(past, "response")
    with pytest.raises(ValueError, match="granularity: expected one of 'token', 'sequence', 'batch', got 'layer'"):
        PromptPlan(granularity="layer")
    with pytest.raises(ValueError, match="budget: expected the number of layers to skip with signal 'cosine'"):
        PromptPlan(signal="cosine")
    with pytest.raises(ValueError, match="alpha: expected a finite number"):
        PromptPlan(-1)
    with pytest.raises(ValueError, match="protect: expected layer indices below 9, got 9"):
        PromptPlan(protect=[9]).decide(history(), "response")
    with pytest.raises(ValueError, match=r"at_least: expected at most 6 of 9 layers \(3 are protected\), got 7"):
        PromptPlan(at_least=7).decide(history(), "response")


def test_protected_layers_run() -> None:
    for protect, default in (([], True), ([3, 4], True), ([3, 4], False)):
        policy = PromptPlan(signal="abs_delta", budget=LAYERS, protect=(p for p in protect), protect_default=default)
        row = skipped(policy.decide(history(rows=1), "response"), 1)[0]
        kept = set(protect) | (DEFAULT if default else set())
        assert {layer for layer in range(LAYERS) if not row[layer]} == kept
