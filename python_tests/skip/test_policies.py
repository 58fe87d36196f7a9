"""Policies: what all have in common, what they may answer, and the one that has its plan beforehand."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest
import torch
from torch import Tensor

import void_ext
from python_tests.skip.histories import LAYERS, history
from void_ext import HaltPlan, History, PhasePlan, Policy, PromptPlan, RefreshPlan, StaticPlan, VoidPlan, policies
from void_ext.policies import check_decision


def test_static_plan_is_said_once() -> None:
    plan = VoidPlan.from_layers(LAYERS, skip=[3])
    policy = StaticPlan(plan)
    assert policy.decide(None, "prompt") is plan
    assert policy.decide(None, "response") is plan  # a trace that starts with phase("response")
    assert policy.decide(history(), "response") is None  # rows in force may have been permuted since
    assert (policy.needs_updates, policy.every_token, policy.by_row, policy.halts) == (False, False, False, False)
    rows = PhasePlan([[2] * LAYERS] * 2, [[2] * LAYERS] * 2)
    assert StaticPlan(VoidPlan(rows, rows)).by_row
    with pytest.raises(TypeError, match="plan: expected a VoidPlan, got PhasePlan"):
        StaticPlan(rows)  # type: ignore[arg-type]
    assert repr(policy).startswith("StaticPlan(VoidPlan(layers=9")


def test_policies_say_what_they_are() -> None:
    text = repr(PromptPlan(0.5, budget=2, protect=[4]))
    assert text == (
        "PromptPlan(signal='delta', alpha=0.5, budget=2.0, at_least=None, protect=(4,), protect_default=True, "
        "granularity='token')"
    )
    assert PromptPlan(0.5).decide(history(), "response").source == repr(PromptPlan(0.5))
    assert repr(RefreshPlan(4)).startswith("RefreshPlan(every=4, signal='delta'")
    assert repr(HaltPlan(min_layers=3)).startswith(
        "HaltPlan(alpha=0.8, min_layers=3, granularity='token', signal='delta'"
    )


def test_policies_can_be_copied() -> None:
    """deepcopy and torch.save of a patched model take its policy along."""
    past = history(prompt=3, response=2)
    policy = RefreshPlan(every=3)
    policy.decide(past, "response")
    assert isinstance(copy.deepcopy(policy).decide(past, "response"), Tensor)
    assert isinstance(policy.decide(past, "response"), Tensor)


def test_the_example_in_the_documentation() -> None:
    result = doctest.testmod(policies)
    assert result.attempted >= 5
    assert not result.failed


def test_a_policy_is_a_class_with_one_method() -> None:
    class Mine(Policy):
        def decide(self, history: History | None, phase: str) -> None:
            return None

    assert (Mine().needs_updates, Mine().every_token, Mine().by_row, Mine().halts) == (False, False, False, False)

    class Nothing(Policy):
        pass

    with pytest.raises(TypeError, match="decide"):
        Nothing()  # type: ignore[abstract]
    for policy in (StaticPlan(VoidPlan.dense(2)), PromptPlan(), RefreshPlan(3), HaltPlan(), Mine()):
        assert isinstance(policy, Policy)
    assert not isinstance(VoidPlan.dense(2), Policy)


def test_history_counts() -> None:
    past = history(rows=2, prompt=4, response=3)
    assert (past.rows, past.layers) == (2, LAYERS)
    assert past.real("prompt").tolist() == [[True] * 4 + [False] * 3, [False] * 3 + [True] + [False] * 3]
    assert past.real("response").sum() == 6
    with pytest.raises(ValueError, match="phase: expected one of 'prompt', 'response', got 'both'"):
        past.real("both")
    alone = history(rows=2, prompt=4)
    assert alone.real("prompt") is alone.mask


def uniform(rows: int) -> VoidPlan:
    table = PhasePlan([[2] * 4] * rows, [[2] * 4] * rows)
    return VoidPlan(table, table)


@pytest.mark.parametrize(
    ("decision", "error", "message"),
    [
        ("dense", TypeError, "decide: expected a VoidPlan, a bool tensor or None, got str"),
        (True, TypeError, "decide: expected a VoidPlan, a bool tensor or None, got bool"),
        (PhasePlan.dense(4), TypeError, "decide: expected a VoidPlan, .*, got PhasePlan"),
        (VoidPlan.dense(5), ValueError, "decide: expected a plan for 4 layers, got one for 5"),
        (uniform(2), ValueError, "decide: expected a plan for 3 rows or for all alike, got one for 2"),
        (torch.ones(3, 4), TypeError, r"decide: expected a tensor of torch.bool, got torch.float32"),
        (torch.ones(3, 5).bool(), ValueError, r"decide: expected a tensor \[3, 4\] or \[3, 4, 2\], got \[3, 5\]"),
        (torch.ones(4).bool(), ValueError, r"decide: expected a tensor \[3, 4\] or \[3, 4, 2\], got \[4\]"),
        (torch.ones(3, 4, 3).bool(), ValueError, r"decide: expected a tensor .*, got \[3, 4, 3\]"),
        (
            torch.ones(3, 4, device="meta").bool(),
            ValueError,
            "decide: expected a tensor on cpu, where the norms are, got meta",
        ),
    ],
)
def test_decisions_that_make_no_sense(decision: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_decision(decision, 3, 4, device=torch.device("cpu"))


def test_decisions_that_do() -> None:
    for decision in (None, VoidPlan.dense(4), uniform(3), torch.ones(3, 4).bool(), torch.ones(3, 4, 2).bool()):
        check_decision(decision, 3, 4, device=torch.device("cpu"))
        check_decision(decision, 3, 4)
    with pytest.raises(ValueError, match="expected one plan for all rows from a policy that says by_row = False"):
        check_decision(uniform(3), 3, 4, by_row=False)
    assert void_ext.History is History
