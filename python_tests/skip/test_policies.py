"""Policies: what they decide from what tokens showed, when it governs, and that nobody waits for it."""

from __future__ import annotations

import ast
import copy
import doctest
import inspect
import itertools
import math
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import void_ext
from void_ext import (
    Action,
    HaltPlan,
    History,
    PhasePlan,
    Policy,
    PromptPlan,
    RefreshPlan,
    StaticPlan,
    VoidPlan,
    _ranking,
    policies,
)
from void_ext.policies import check_decision

LAYERS = 9
DEFAULT = {0, 1, LAYERS - 1}
SIGNALS = ["delta", "abs_delta", "relative_update", "cosine"]


def history(rows: int = 3, prompt: int = 7, response: int = 0, seed: int = 0, padded: bool = True) -> History:
    """Random walks of vectors, so that updates belong to the norms. Row 1 has pads on the left, row 2 nothing else."""
    generator = torch.Generator().manual_seed(seed)
    length = prompt + response
    steps = torch.randn(rows, length, LAYERS + 1, 6, generator=generator)
    scale = torch.rand(LAYERS + 1, 1, generator=generator) * 1.5 + 0.05
    stream = (steps * scale).cumsum(2) + 1
    mask = torch.ones(rows, length, dtype=torch.bool)
    if padded and rows > 1:
        mask[1, :3] = False
    if padded and rows > 2:
        mask[2] = False
    return History(
        stream.norm(dim=-1),
        torch.ones(rows, length, LAYERS, dtype=torch.bool),
        mask,
        stream.diff(dim=2).norm(dim=-1),
        [0] * prompt + [1] * response,
    )


# ---- the definition, in loops over Python numbers ----


def voids_of(norms: list[float], ran: list[bool], alpha: float) -> list[bool]:
    values = torch.tensor(norms, dtype=torch.float32)
    found, before = [], []
    for layer in range(len(norms) - 1):
        delta = values[layer + 1] - values[layer]
        earlier = torch.stack(before) if before else torch.zeros(1)
        spread = earlier.max() - earlier.min()  # unlike Python's, they keep a NaN
        found.append(ran[layer] and bool(delta < torch.tensor(alpha) * spread))
        if ran[layer]:
            before.append(delta)
    return found


def signal_of(signal: str, before: float, after: float, update: float) -> float:
    if signal == "abs_delta":
        return abs(after - before)
    if signal == "relative_update":
        return update / before
    return 1 - (before**2 + after**2 - update**2) / (2 * before * after)


def expected_skip(
    tokens: list[tuple[list[float], list[bool], list[float]]],
    signal: str = "delta",
    alpha: float = 0.8,
    most: int | None = None,
    least: int = 0,
    protected: Any = DEFAULT,
) -> list[bool]:
    """Layers to skip by these tokens, each (norms, executed, updates)."""
    entries = []
    for layer in range(LAYERS):
        seen = [token for token in tokens if token[1][layer]]
        if not seen or layer in protected:
            continue
        change = math.fsum(abs(n[layer + 1] - n[layer]) for n, _, _ in seen) / len(seen)
        if signal == "delta":
            count = sum(voids_of(n, ran, alpha)[layer] for n, ran, _ in seen)
            wanted = 2 * count > len(seen) if most is None else count > 0
            entries.append((-count / len(seen), change, layer, wanted))
        else:
            values = [signal_of(signal, n[layer], n[layer + 1], u[layer]) for n, _, u in seen]
            entries.append((math.fsum(values) / len(values), change, layer, True))
    entries.sort()
    taken = {entry[2] for entry in [e for e in entries if e[3]][:most]} | {entry[2] for entry in entries[:least]}
    return [layer in taken for layer in range(LAYERS)]


def tokens_of(past: History, row: int, positions: Any) -> list[tuple[list[float], list[bool], list[float]]]:
    assert past.updates is not None
    return [
        (past.norms[row, t].tolist(), past.executed[row, t].tolist(), past.updates[row, t].tolist())
        for t in positions
        if past.mask[row, t]
    ]


def together(tokens: list[tuple[list[float], list[bool], list[float]]]) -> list[Any]:
    """One token whose norms are those of all of them that ran every layer, taken together."""
    tokens = [token for token in tokens if all(token[1])]
    if not tokens:
        return []
    pooled = [
        [math.sqrt(math.fsum(token[part][i] ** 2 for token in tokens)) for i in range(LAYERS + 1 - part // 2)]
        for part in (0, 2)
    ]
    # Norms are kept in float32.
    norms, updates = (torch.tensor(values).tolist() for values in pooled)
    return [(norms, [True] * LAYERS, updates)]


def expected_rows(past: History, granularity: str, positions: Any, **options: Any) -> list[list[bool]]:
    rows = [tokens_of(past, row, positions) for row in range(past.rows)]
    if granularity == "batch":
        return [expected_skip(together(list(itertools.chain(*rows))), **options)] * past.rows
    if granularity == "sequence":
        rows = [together(tokens) for tokens in rows]
    return [expected_skip(tokens, **options) for tokens in rows]


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


# ---- StaticPlan ----


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


# ---- PromptPlan ----


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


# ---- RefreshPlan ----


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


def test_policies_can_be_copied() -> None:
    """deepcopy and torch.save of a patched model take its policy along."""
    past = history(prompt=3, response=2)
    policy = RefreshPlan(every=3)
    policy.decide(past, "response")
    assert isinstance(copy.deepcopy(policy).decide(past, "response"), Tensor)
    assert isinstance(policy.decide(past, "response"), Tensor)


# ---- nobody waits ----

WAITING = {"item", "cpu", "tolist", "nonzero", "numpy", "to", "is_nonzero", "equal", "unique", "masked_select"}


def on_the_device() -> list[Callable[..., Any]]:
    found: list[Callable[..., Any]] = [RefreshPlan.decide, RefreshPlan._table, RefreshPlan._updates]
    found += [HaltPlan.decide, HaltPlan.runs, HaltPlan.step, HaltPlan._void]
    found += [value for value in vars(_ranking).values() if inspect.isfunction(value)]
    found += [_ranking.Evidence.pooled, _ranking.Evidence.__add__]
    return [function for function in found if function.__module__.startswith((policies.__name__, _ranking.__name__))]


@pytest.mark.parametrize("function", on_the_device(), ids=lambda function: function.__qualname__)
def test_source_asks_the_device_for_nothing(function: Callable[..., Any]) -> None:
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Attribute):
            assert node.attr not in WAITING, ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("bool", "int", "float", "any", "all", "max", "min"), ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.tensor", "torch.as_tensor"):
            pytest.fail("a copy from the host waits too: " + ast.unparse(node))
        if isinstance(node, ast.Subscript):  # indexing by a mask asks how many
            assert "mask" not in ast.unparse(node.slice), ast.unparse(node)


@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_tables_without_data(granularity: str, signal: str) -> None:
    """On tensors without content, whatever would read one raises; two alike on any device."""
    with FakeTensorMode() as mode:
        past = history(prompt=3, response=1)
        assert past.updates is not None
        with pytest.raises(DataDependentOutputException):
            bool(past.mask.any())
        policy = RefreshPlan(3, granularity=granularity, signal=signal, budget=2, at_least=1)
        policy.decide(past, "response")
        table = policy.decide(past, "response")
        assert isinstance(table, Tensor)
        assert (table.shape, table.dtype, table.device) == ((3, LAYERS), torch.bool, past.norms.device)
        halted = torch.zeros(3, dtype=torch.bool)
        halted = HaltPlan(budget=4).step(past.norms[:, -1], past.executed[:, -1], halted, 5, LAYERS)
        assert halted.shape == (3,)
    del mode


@pytest.mark.parametrize("granularity", ["token", "batch"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_device_is_not_waited_for(device: torch.device, granularity: str, signal: str) -> None:
    past = history(prompt=3, response=1, padded=False)
    assert past.updates is not None
    tables = (table.to(device) for table in (past.norms, past.executed, past.mask, past.updates))
    there = History(*tables, past.phases)
    options: dict[str, Any] = {"granularity": granularity, "signal": signal, "alpha": 0.1, "budget": 3}
    found = []
    for where in (past, there):
        policy = RefreshPlan(3, **options)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            policy.decide(where, "response")
            table = policy.decide(where, "response")
            assert isinstance(table, Tensor)
            halted = torch.zeros(3, dtype=torch.bool, device=where.norms.device)
            for layer in range(LAYERS):
                halted = HaltPlan(0.1).step(where.norms[:, -1], where.executed[:, -1], halted, layer)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        found.append((table.tolist(), halted.tolist()))
    assert found[0] == found[1]


# ---- HaltPlan ----


@given(
    seed=st.integers(0, 500),
    alpha=st.sampled_from([0.0, 0.1, 0.8]),
    min_layers=st.integers(1, LAYERS),
    budget=st.none() | st.integers(0, LAYERS),
    protect=st.sets(st.integers(0, LAYERS - 1)),
    default=st.booleans(),
)
def test_halting_is_the_definition(
    seed: int, alpha: float, min_layers: int, budget: int | None, protect: set[int], default: bool
) -> None:
    past = history(rows=5, prompt=1, seed=seed)
    norms = past.norms[:, 0]
    norms[3, 4] = math.nan
    policy = HaltPlan(alpha, min_layers=min_layers, budget=budget, protect=protect, protect_default=default)
    kept = protect | (DEFAULT if default else set())
    halted = torch.zeros(5, dtype=torch.bool)
    for layer in range(LAYERS):
        runs = policy.runs(halted, layer, LAYERS)
        before = halted.clone()
        after = policy.step(norms[:, : layer + 2], None, halted, layer, LAYERS)
        assert torch.equal(halted, before), "written to"
        halted = after
        for row in range(5):
            voids = voids_of(norms[row].tolist(), [True] * LAYERS, alpha)
            behind = [len([free for free in range(v + 1, LAYERS) if free not in kept]) for v in range(LAYERS)]
            heeded = [
                v
                for v in range(layer + 1)
                if voids[v] and v + 1 >= min_layers and (budget is None or behind[v] <= budget)
            ]
            assert bool(halted[row]) == bool(heeded)
            assert bool(runs[row]) == (layer in kept or not before[row])
    assert policy.decide(past, "response") is None
    assert policy.halts
    assert policy.by_row


@given(
    seed=st.integers(0, 500),
    alpha=st.sampled_from([0.1, 0.8]),
    signal=st.sampled_from(["delta", "abs_delta", "relative_update", "cosine"]),
    granularity=st.sampled_from(["token", "sequence", "batch"]),
)
def test_halting_by_signal_and_granularity_is_the_definition(
    seed: int, alpha: float, signal: str, granularity: str
) -> None:
    batch, length = 3, 4
    random = torch.Generator().manual_seed(seed)
    norms = torch.rand(batch * length, LAYERS + 1, generator=random) * 9 + 1
    gaps = (norms[:, 1:] - norms[:, :-1]).abs()
    updates = gaps + torch.rand(batch * length, LAYERS, generator=random)
    real = torch.rand(batch, length, generator=random) > 0.3
    real[2] = False
    policy = HaltPlan(alpha, signal=signal, granularity=granularity)
    assert policy.by_row == (granularity != "batch")
    assert policy.needs_updates == (signal in ("relative_update", "cosine"))
    halted = torch.zeros(batch * length, dtype=torch.bool)
    for layer in range(LAYERS):
        halted = policy.step(norms, None, halted, layer, LAYERS, updates=updates, real=real, batch=batch)

    groups: list[list[int]] = {
        "token": [[row] for row in range(batch * length)],
        "sequence": [[row * length + t for t in range(length)] for row in range(batch)],
        "batch": [list(range(batch * length))],
    }[granularity]
    for members in groups:
        told = members if granularity == "token" else [m for m in members if real.flatten()[m]]
        n = norms[told].double().square().sum(0).sqrt().float().double().tolist()
        u = updates[told].double().square().sum(0).sqrt().float().double().tolist()
        said = [0.0] * LAYERS
        for layer in range(LAYERS) if told else ():
            gap = n[layer + 1] - n[layer]
            if signal in ("delta", "abs_delta"):
                said[layer] = gap if signal == "delta" else abs(gap)
            elif signal == "relative_update":
                said[layer] = u[layer] / n[layer]
            else:
                said[layer] = (u[layer] ** 2 - gap**2) / (2 * n[layer] * n[layer + 1])
        voids = [
            bool(told) and said[layer] < (alpha * (max(said[:layer]) - min(said[:layer])) if layer else 0.0) - 1e-6
            for layer in range(LAYERS)
        ]
        near = [
            layer > 0 and abs(said[layer] - alpha * (max(said[:layer]) - min(said[:layer]))) <= 1e-6
            for layer in range(LAYERS)
        ]
        if not any(near):
            assert {bool(halted[m]) for m in members} == {any(voids)}


def test_layers_that_did_not_run_halt_nobody() -> None:
    norms = torch.tensor([[10.0, 14.0, 15.0, 14.0, 17.0, 21.0]] * 2)  # layers 2 and 3 are voids at 0.8
    executed = torch.tensor([[True] * 5, [True, True, False, True, True]])
    halted = torch.zeros(2, dtype=torch.bool)
    seen = []
    for layer in range(5):
        halted = HaltPlan(0.8).step(norms, executed, halted, layer)
        seen.append(halted.tolist())
    # Without layer 2, the threshold of layer 3 is 0.8 * (4 - 1) = 2.4: its 3 is active, and so is 4.
    assert seen == [[False, False], [False, False], [True, False], [True, False], [True, False]]


def test_halt_plan_refuses() -> None:
    halted = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"norms: expected \[rows, 5\] for layer 3, got \[2, 4\]"):
        HaltPlan().step(torch.zeros(2, 4), None, halted, 3)
    with pytest.raises(ValueError, match="layers: expected the number of layers, which a budget needs, got None"):
        HaltPlan(budget=2).step(torch.zeros(2, 4), None, halted, 2)
    with pytest.raises(ValueError, match=r"updates: expected \[rows, 3\] with signal 'cosine', got None"):
        HaltPlan(signal="cosine").step(torch.zeros(2, 4), None, halted, 2)
    with pytest.raises(ValueError, match="signal: expected one of 'delta'"):
        HaltPlan(signal="norm")
    with pytest.raises(ValueError, match="granularity: expected one of 'token'"):
        HaltPlan(granularity="layer")
    with pytest.raises(ValueError, match="min_layers: expected an int >= 1, got 0"):
        HaltPlan(min_layers=0)
    with pytest.raises(TypeError, match="min_layers: expected an int >= 1, got float 2"):
        HaltPlan(min_layers=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha: expected a finite number >= 0, got -1"):
        HaltPlan(-1)


# ---- policies of one's own ----


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
