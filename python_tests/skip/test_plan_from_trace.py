"""Plans made from traces leave out what the definition does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import Any

import pytest
import torch

import void_ext
from python_tests.skip.definition import Token, units_off
from void_ext import Action, PhasePlan, VoidPlan
from void_ext.plan import Fingerprint

S, P, R = Action.SKIP, Action.PROJECT, Action.RUN
LAYERS = 8


@pytest.fixture(scope="module")
def traces(model: Any) -> list[void_ext.Trace]:
    """Two traces of padded batches, with everything that can be traced."""
    found = []
    for seed in (3, 4):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 96, (3, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        mask[2, :8] = 0
        with void_ext.patch(model, alpha=0.3, updates=True, halves=True) as handle:
            options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": [2, 30, 60]}
            model.generate(input_ids=ids, attention_mask=mask, **options)
        assert handle.trace is not None
        found.append(handle.trace)
    return found


def tokens_of(traces: list[void_ext.Trace], phases: list[str], halves: bool) -> list[Token]:
    """Each real token, its norms from before the first unit to after the last."""
    found = []
    for trace, name in itertools.product(traces, phases):
        phase = getattr(trace, name)
        for b, t in itertools.product(*map(range, phase.mask.shape)):
            if phase.mask[b, t]:
                norms, updates = phase.norms[b, t].tolist(), phase.updates[b, t].tolist()
                if halves:
                    between = phase.halves[b, t].tolist()
                    norms = [norms[0]] + [n for pair in zip(between, norms[1:], strict=True) for n in pair]
                    updates = [math.nan] * (2 * LAYERS)  # not traced for halves
                found.append((norms, [True] * len(updates), updates))
    return found


def expected_units(
    traces: list[void_ext.Trace],
    phases: list[str],
    *,
    alpha: float = 0.3,
    protected: Collection[int] = (0, 1, LAYERS - 1),
    halves: bool = False,
    **options: Any,
) -> set[int]:
    kept = {2 * layer + half for layer in protected for half in (0, 1)} if halves else protected
    return units_off(tokens_of(traces, phases, halves), kept, alpha=alpha, **options)


def off(phase: PhasePlan) -> tuple[set[int], set[int]]:
    return (
        {layer for layer, action in enumerate(phase.attention) if action != R},
        {layer for layer, action in enumerate(phase.mlp) if action != R},
    )


@pytest.mark.parametrize("alpha", [None, 0.0, 0.1, 0.8, 3.0])
@pytest.mark.parametrize("bounds", [{}, {"budget": 1}, {"budget": 2.5}, {"at_least": 3}, {"budget": 4, "at_least": 4}])
def test_delta_takes_the_layers_with_most_voids(alpha: Any, bounds: Any, traces: list[void_ext.Trace]) -> None:
    for given_, phase in ((traces[:1], "both"), (traces, "both"), (traces, "prompt"), (traces, "response")):
        plan = VoidPlan.from_trace(given_ if len(given_) > 1 else given_[0], alpha=alpha, phase=phase, **bounds)
        most = math.floor(bounds["budget"]) if "budget" in bounds else None
        expected = expected_units(
            given_,
            ["prompt", "response"] if phase == "both" else [phase],
            alpha=0.3 if alpha is None else alpha,
            most=most,
            least=bounds.get("at_least", 0),
        )
        for name in ("prompt", "response"):
            assert off(plan.phase(name)) == ((expected, expected) if phase in ("both", name) else (set(), set()))
        assert plan.prompt.skipped <= bounds.get("budget", LAYERS)


def test_at_some_alpha_the_choice_is_not_trivial(traces: list[void_ext.Trace]) -> None:
    sizes = {
        len(expected_units(traces, ["prompt"], alpha=alpha, protected=set())) for alpha in (0.0, 0.1, 0.3, 0.8, 3.0)
    }
    assert len(sizes) >= 3


@pytest.mark.parametrize("signal", ["abs_delta", "relative_update", "cosine"])
@pytest.mark.parametrize("budget", [0, 1, 3, 100])
def test_other_signals_take_the_smallest(signal: str, budget: int, traces: list[void_ext.Trace]) -> None:
    plan = VoidPlan.from_trace(traces, signal=signal, budget=budget, protect_default=False, phase="response")
    expected = expected_units(traces, ["response"], signal=signal, most=budget, protected=set())
    assert off(plan.response) == (expected, expected)
    assert len(expected) == min(budget, LAYERS)


@pytest.mark.parametrize("signal", ["delta", "abs_delta"])
@pytest.mark.parametrize("budget", [0.5, 1, 2.5, 4.9])
def test_halves_are_ranked_apart(signal: str, budget: float, traces: list[void_ext.Trace]) -> None:
    plan = VoidPlan.from_trace(traces, signal=signal, budget=budget, halves=True, protect=[3])
    units = expected_units(
        traces,
        ["prompt", "response"],
        signal=signal,
        most=math.floor(2 * budget),
        protected={0, 1, 3, LAYERS - 1},
        halves=True,
    )
    assert off(plan.prompt) == ({u // 2 for u in units if u % 2 == 0}, {u // 2 for u in units if u % 2 == 1})
    assert plan.prompt == plan.response
    assert plan.prompt.skipped == len(units) / 2 <= budget


def test_two_sets_are_legal_whatever_they_are(traces: list[void_ext.Trace]) -> None:
    for budget, alpha in itertools.product((1, 2, 3, 4), (0.0, 0.1, 0.3, 0.8)):
        options: dict[str, Any] = {"alpha": alpha, "budget": budget, "protect_default": False}
        plan = VoidPlan.from_trace(traces, phase="each", **options)
        first, then = (
            expected_units(traces, [name], alpha=alpha, most=budget, protected=set()) for name in ("prompt", "response")
        )
        assert off(plan.prompt) == (first, first)
        assert off(plan.response) == (then, then)
        for layer in range(LAYERS):
            assert plan.prompt.attention[layer] == (R if layer not in first else S if layer in then else P)
            assert plan.response.attention[layer] == (S if layer in then else R)
        kept = VoidPlan.from_trace(traces, phase="each", action="project", **options)
        assert {*kept.prompt.attention, *kept.response.attention} <= {P, R}
        assert off(kept.prompt) == (first, first)


def test_actions_and_phases(traces: list[void_ext.Trace]) -> None:
    def actions(**options: Any) -> tuple[set[Action], set[Action]]:
        plan = VoidPlan.from_trace(traces, budget=2, at_least=2, **options)
        return set(plan.prompt.attention) - {R}, set(plan.response.attention) - {R}

    assert actions() == ({S}, {S})
    assert actions(action="project") == ({P}, {P})
    assert actions(phase="prompt") == ({P}, set())
    assert actions(phase="response") == (set(), {S})
    assert actions(phase="response", action="project") == (set(), {P})
    with pytest.raises(ValueError, match="action: expected 'project' with phase='prompt', got 'skip'"):
        actions(phase="prompt", action="skip")


def test_protected_layers(traces: list[void_ext.Trace]) -> None:
    everything: dict[str, Any] = {"signal": "abs_delta", "budget": LAYERS}
    plan = VoidPlan.from_trace(traces, **everything)
    assert off(plan.prompt)[0] == {2, 3, 4, 5, 6}
    plan = VoidPlan.from_trace(traces, **everything, protect=[4, 1])
    assert off(plan.prompt)[0] == {2, 3, 5, 6}
    plan = VoidPlan.from_trace(traces, **everything, protect=[4], protect_default=False)
    assert off(plan.prompt)[0] == {0, 1, 2, 3, 5, 6, 7}
    assert plan.source == (
        "from_trace(signal='abs_delta', budget=8.0, protect=[4], protect_default=False, phase='both', action='skip')"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"signal": "entropy"},
            ValueError,
            "signal: expected one of 'delta', 'abs_delta', 'relative_update'",
        ),
        ({"signal": "cosine"}, ValueError, "budget: expected the number of layers to skip with signal 'cosine'"),
        ({"signal": "cosine", "budget": 2, "halves": True}, ValueError, "'cosine' needs .* not traced for halves"),
        ({"budget": -1}, ValueError, "budget: expected a number of layers >= 0 or None, got -1"),
        ({"budget": float("nan")}, ValueError, "budget: expected a number of layers >= 0 or None, got nan"),
        ({"budget": math.inf}, ValueError, "budget: expected a number of layers >= 0 or None, got inf"),
        ({"budget": True}, TypeError, "budget: expected a number of layers .*, got bool True"),
        ({"at_least": "2"}, TypeError, "at_least: expected a number of layers .*, got str '2'"),
        ({"budget": 2, "at_least": 3}, ValueError, "at_least: expected at most the budget 2, got 3"),
        ({"budget": 2.5, "at_least": 2.5}, ValueError, "at_least: expected a whole number of layers between 2.5 and"),
        ({"at_least": 6}, ValueError, r"at_least: expected at most 5 of 8 layers \(3 are protected\), got 6"),
        ({"protect": [8]}, ValueError, "protect: expected layer indices below 8, got 8"),
        ({"protect": [-1]}, ValueError, "protect: expected layer indices >= 0"),
        ({"protect": 3}, TypeError, "protect: expected a list of layer indices, got int 3"),
        ({"protect_default": None}, TypeError, "protect_default: expected True or False, got NoneType None"),
        ({"halves": 1}, TypeError, "halves: expected True or False, got int 1"),
        ({"phase": "decode"}, ValueError, "phase: expected one of 'both', 'prompt', 'response', 'each', got"),
        ({"action": "run"}, ValueError, "action: expected one of 'skip', 'project', got 'run'"),
        ({"alpha": -1}, ValueError, "alpha: expected a finite number >= 0, got -1"),
    ],
)
def test_from_trace_refuses(options: Any, error: type[Exception], message: str, traces: list[void_ext.Trace]) -> None:
    with pytest.raises(error, match=message):
        VoidPlan.from_trace(traces[0], **options)


def test_from_trace_refuses_traces_that_cannot_tell(model: Any, traces: list[void_ext.Trace], build: Any) -> None:
    ids = torch.randint(3, 96, (1, 5))
    with void_ext.patch(model, alpha=0.3) as handle, torch.no_grad():
        model(input_ids=ids)
    plain = handle.trace
    assert plain is not None
    for signal in ("relative_update", "cosine"):
        with pytest.raises(ValueError, match=rf"{signal}' needs the norms of updates.*patch\(…, updates=True\)"):
            VoidPlan.from_trace(plain, signal=signal, budget=1)
    with pytest.raises(ValueError, match=r"halves: expected a trace with the norms between halves; .*halves=True"):
        VoidPlan.from_trace(plain, halves=True)
    with pytest.raises(ValueError, match="trace: expected at least one real token in the response, got none"):
        VoidPlan.from_trace(plain, phase="response")
    assert VoidPlan.from_trace(plain) == VoidPlan.from_trace([plain])  # without a response, the prompt alone counts
    with pytest.raises(ValueError, match="model: expected the 8 layers that were traced, got 7"):
        VoidPlan.from_trace(plain, build(layers=7))
    with pytest.raises(TypeError, match=r"trace: expected a void_ext\.Trace or a list of them, got PhaseTrace"):
        VoidPlan.from_trace(traces[0].prompt)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trace: expected at least one trace, got an empty list"):
        VoidPlan.from_trace([])
    assert VoidPlan.from_trace(traces[0]) == VoidPlan.from_trace(traces[0], alpha=0.3)
    with void_ext.patch(model, alpha=0.8) as handle, torch.no_grad():
        model(input_ids=ids)
    assert handle.trace is not None
    for several in ([plain, handle.trace], [handle.trace, plain]):
        with pytest.raises(
            ValueError, match=r"alpha: expected one for all traces, .* made with 0\.3, 0\.8, got None; give"
        ):
            VoidPlan.from_trace(several)
        assert "alpha=0.5" in VoidPlan.from_trace(several, alpha=0.5).source
        assert "alpha" not in VoidPlan.from_trace(several, signal="abs_delta", budget=1).source  # none is needed
    small = build(layers=4)
    with void_ext.patch(small, granularity="batch", halves=True) as handle, torch.no_grad():
        small(input_ids=ids)
    assert handle.trace is not None
    with pytest.raises(ValueError, match="expected traces of one model, got 'llama' with 8 layers and 'llama' with 4"):
        VoidPlan.from_trace([plain, handle.trace])
    with pytest.raises(ValueError, match="halves: expected a trace with granularity 'token'"):
        VoidPlan.from_trace(handle.trace, halves=True)
    assert VoidPlan.from_trace(handle.trace, small, budget=1).fingerprint == Fingerprint.of(small)
