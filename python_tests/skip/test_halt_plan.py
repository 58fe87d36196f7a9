"""HaltPlan: who has halted after each layer is what the definition says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from python_tests.skip.definition import voids_of
from python_tests.skip.histories import DEFAULT, LAYERS, history
from void_ext import HaltPlan


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
