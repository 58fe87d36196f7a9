"""RefreshPlan: every k-th token decides, by the definition, for those that follow, and when that governs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.skip.histories import LAYERS, SIGNALS, expected_rows, expected_skip, history, tokens_of
from void_ext import History, Policy, RefreshPlan, VoidPlan
from void_ext.policies import check_decision


class Driver:
    """Calls a policy as a patched model does, and keeps what governed each forward."""

    def __init__(self, policy: Policy, full: History, prompt: int):
        self.policy, self.full, self.length = policy, full, prompt
        self.in_force: Any = "dense at the start"
        self.pending: Tensor | None = None
        self.governed: list[Any] = []
        self.decisions: list[Any] = []
        self.ask(None, "prompt")

    def ask(self, past: History | None, phase: str) -> None:
        decision = self.policy.decide(past, phase)
        check_decision(decision, self.full.rows, LAYERS, device=self.full.norms.device, by_row=self.policy.by_row)
        self.decisions.append(decision)
        if self.pending is not None:  # returned by the call before this one
            self.in_force, self.pending = self.pending, None
        if isinstance(decision, VoidPlan):
            self.in_force = decision
        elif decision is not None:
            self.pending = decision

    def past(self) -> History:
        full = self.full
        assert full.updates is not None
        tables = (table[:, : self.length] for table in (full.norms, full.executed, full.mask, full.updates))
        return History(*tables, full.phases[: self.length])

    def token(self) -> None:
        self.ask(self.past(), "response")
        self.governed.append(self.in_force)
        if isinstance(self.in_force, Tensor):
            self.full.executed[:, self.length] = self.in_force
        self.length += 1


@pytest.mark.parametrize("every", [3, 4, 7])
@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_refresh_plan_is_the_definition(every: int, granularity: str, signal: str) -> None:
    full = history(prompt=5, response=20, seed=every, padded=False)
    options: dict[str, Any] = {"signal": signal, "alpha": 0.1}
    bounds = {} if signal == "delta" else {"budget": 3}
    driver = Driver(RefreshPlan(every, granularity=granularity, **options, **bounds), full, prompt=5)
    for _ in range(20):
        driver.token()
    for token, governed in enumerate(driver.governed):
        begun = token - token % every
        if token - begun < 2:
            assert governed == VoidPlan.dense(LAYERS)
            continue
        expected = expected_rows(full, granularity, [5 + begun], most=bounds.get("budget"), **options)
        assert (~governed).tolist() == expected, token
        assert governed.dtype == torch.bool
        assert any(map(any, expected))
    for call, decision in enumerate(driver.decisions[1:]):
        kinds = {0: VoidPlan, 1: Tensor}
        assert isinstance(decision, kinds.get(call % every, type(None)))


def test_refresh_plan_starts_again_with_each_response() -> None:
    full = history(rows=2, prompt=4, response=5, padded=False)
    policy = RefreshPlan(4, alpha=0.1)
    assert policy.every_token
    driver = Driver(policy, full, prompt=4)
    driver.token()
    driver.token()
    # Another trace: the count and a table on its way are of no interest.
    assert policy.decide(None, "prompt") is None
    again = Driver(policy, history(rows=2, prompt=4, response=5, padded=False), prompt=4)
    for _ in range(3):
        again.token()
    assert [isinstance(governed, VoidPlan) for governed in again.governed] == [True, True, False]
    # A second turn on the same cache: what was a response belongs to the prompt now, and nobody may have asked there.
    past = again.past()
    past.phases = [0] * len(past.phases)
    assert policy.decide(past, "response") == VoidPlan.dense(LAYERS)
    assert policy.decide(past, "prompt") == VoidPlan.dense(LAYERS)
    assert policy.decide(again.past(), "response") == VoidPlan.dense(LAYERS)
    assert isinstance(policy.decide(again.past(), "response"), Tensor)


def test_refresh_plan_and_nan_and_ended_rows() -> None:
    past = history(rows=4, prompt=3, response=1, padded=False)
    past.norms[1] = math.nan
    past.mask[2, -1] = past.mask[3, -1] = False
    policy = RefreshPlan(3, alpha=0.1, at_least=2, budget=3)
    policy.decide(past, "response")
    table = policy.decide(past, "response")
    assert isinstance(table, Tensor)
    assert table[1].all(), "NaN norms are active"
    expected = expected_skip(tokens_of(past, 0, [3]), alpha=0.1, most=3, least=2)
    assert (~table[0]).tolist() == expected
    # Rows that ended ask for nothing that a live row does not ask for.
    assert torch.equal(table[2], table[0] | table[1])
    past.norms[1] = past.norms[0]
    policy.decide(None, "prompt")
    policy.decide(past, "response")
    table = policy.decide(past, "response")
    assert isinstance(table, Tensor)
    for row in range(4):
        assert (~table[row]).tolist() == expected


def test_refresh_plan_refuses() -> None:
    for wrong in (2, 0, -3):
        with pytest.raises(ValueError, match=rf"every: expected a number of tokens >= 3 .*, got {wrong}"):
            RefreshPlan(wrong)
    for wrong_type in (True, 3.0, "3", None):
        with pytest.raises(TypeError, match="every: expected a number of tokens >= 3, got"):
            RefreshPlan(wrong_type)  # type: ignore[arg-type]
