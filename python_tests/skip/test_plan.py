"""Plans: what they mean, which are legal, and those made of lists of layers."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from void_ext import Action, PhasePlan, VoidPlan
from void_ext.plan import Fingerprint

S, P, R = Action.SKIP, Action.PROJECT, Action.RUN
LAYERS = 8


def test_actions_are_ordered_by_what_they_compute() -> None:
    assert (S, P, R) == (0, 1, 2)
    assert [action.name for action in Action] == ["SKIP", "PROJECT", "RUN"]


def test_a_phase_plan_keeps_tuples_of_actions() -> None:
    plan = PhasePlan([2, 1, 0], [2, 0, 2])
    assert plan.attention == (R, P, S)
    assert plan.mlp == (R, S, R)
    assert all(isinstance(action, Action) for action in plan.attention + plan.mlp)
    assert (plan.layers, plan.rows, plan.skipped) == (3, None, 1.5)
    assert repr(plan) == "PhasePlan(attention='.PS', mlp='.S.')"
    assert plan.row(7) is plan
    assert plan.select_rows([0, 5]) is plan
    assert plan.collapse() is plan


def test_rows_that_differ() -> None:
    plan = PhasePlan([[R, P], [R, R], [S, P]], [[R, S], [R, R], [S, S]])
    assert (plan.layers, plan.rows) == (2, 3)
    assert plan.skipped == (1 + 0 + 2) / 3
    assert plan.row(0) == PhasePlan([R, P], [R, S])
    assert plan.select_rows([2, 0, 2]) == PhasePlan([[S, P], [R, P], [S, P]], [[S, S], [R, S], [S, S]])
    assert plan.collapse() is plan
    assert plan.select_rows([0, 0]).collapse() == PhasePlan([R, P], [R, S])
    assert repr(plan) == "PhasePlan(rows=3, layers=2, skipped=1)"
    for wrong in (3, -1):
        with pytest.raises(IndexError, match=f"row: expected one of 0 … 2, got {wrong}"):
            plan.row(wrong)
        with pytest.raises(IndexError, match=f"row: expected one of 0 … 2, got {wrong}"):
            plan.select_rows([0, wrong])
    with pytest.raises(ValueError, match="indices: expected at least one row, got none"):
        plan.select_rows([])


@pytest.mark.parametrize(
    ("attention", "mlp", "error", "message"),
    [
        ([], [], TypeError, "attention: expected a list of actions"),
        ("RR", "RR", TypeError, "attention: expected a list of actions.*got 'RR'"),
        ([3], [2], ValueError, r"attention\[0\]: expected one of SKIP, PROJECT, RUN, got 3"),
        ([2, "RUN"], [2, 2], ValueError, r"attention\[1\]: expected one of .*, got 'RUN'"),
        ([True], [2], ValueError, r"attention\[0\]: expected one of .*, got True"),
        ([2.0], [2], ValueError, r"attention\[0\]: expected one of .*, got 2.0"),
        ([2], [1], ValueError, r"mlp\[0\]: expected one of SKIP, RUN, got 1"),
        ([2, 2], [2], ValueError, r"mlp: expected the shape of attention, \[2\], got \[1\]"),
        ([[2], [2]], [2, 2], ValueError, r"mlp: expected the shape of attention, \[2, 1\], got \[2\]"),
        ([[2], [2, 2]], [[2], [2]], ValueError, "attention: expected rows of actions, all for the same number"),
        ([[2], 2], [[2], [2]], ValueError, "attention: expected rows of actions"),
        ([[]], [[]], ValueError, "attention: expected rows of actions"),
        ([2, [2]], [2, 2], ValueError, r"attention\[1\]: expected one of"),
    ],
)
def test_what_is_no_table(attention: Any, mlp: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PhasePlan(attention, mlp)


@given(st.data())
def test_only_a_skip_that_a_later_token_reads_is_illegal(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 4))
    row = st.lists(st.sampled_from([S, P, R]), min_size=layers, max_size=layers)
    batch = data.draw(st.integers(1, 3))
    tables = [
        data.draw(st.one_of(row, st.lists(row, min_size=batch, max_size=batch)), label=name)
        for name in ("prompt", "response")
    ]
    halves = []
    for table in tables:
        full = [[R] * layers] * batch if isinstance(table[0], list) else [R] * layers
        halves.append(PhasePlan(table, full))
    expanded = [table if isinstance(table[0], list) else [table] * batch for table in tables]
    holes = [
        (b, layer)
        for b, layer in itertools.product(range(batch), range(layers))
        if expanded[0][b][layer] == S and expanded[1][b][layer] in (P, R)
    ]
    if holes:
        with pytest.raises(ValueError, match=rf"prompt: layer {holes[0][1]}.*SKIPs its attention, a hole in the cache"):
            VoidPlan(*halves)
    else:
        plan = VoidPlan(*halves)
        assert plan.layers == layers
        assert plan.rows in (None, batch)
        for b in range(batch):
            assert plan.row(b).prompt.attention == tuple(expanded[0][b])
            assert plan.row(b).response.attention == tuple(expanded[1][b])


def test_halves_of_a_plan_must_fit(build: Any) -> None:
    two, three = PhasePlan.dense(2), PhasePlan.dense(3)
    with pytest.raises(ValueError, match="response: expected the 2 layers of prompt, got 3"):
        VoidPlan(two, three)
    rows = [PhasePlan([[R, R]] * n, [[R, R]] * n) for n in (2, 3)]
    with pytest.raises(ValueError, match="response: expected 2 rows, as in prompt, got 3"):
        VoidPlan(*rows)
    assert VoidPlan(two, rows[1]).rows == VoidPlan(rows[1], two).rows == 3
    with pytest.raises(TypeError, match="prompt: expected a PhasePlan, got dict"):
        VoidPlan({}, two)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="source: expected text, got int"):
        VoidPlan(two, two, None, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fingerprint: expected a Fingerprint or None, got str"):
        VoidPlan(two, two, "llama")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fingerprint: expected a model of 2 layers, got 8"):
        VoidPlan(two, two, Fingerprint.of(build()))
    with pytest.raises(ValueError, match="phase: expected one of 'prompt', 'response', got 'both'"):
        VoidPlan(two, two).phase("both")


def test_plans_are_values(model: Any) -> None:
    plan = VoidPlan.from_layers(model, skip=[3], phase="response")
    again = VoidPlan.from_layers(model, attention=[3], mlp=[3], phase="response")
    assert plan == again
    assert hash(plan) == hash(again)
    assert plan.source != again.source
    assert plan != VoidPlan.from_layers(model, skip=[4], phase="response")
    assert plan != VoidPlan.from_layers(LAYERS, skip=[3], phase="response")  # no fingerprint
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.prompt = plan.response  # type: ignore[misc]
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan
        assert other.source == plan.source
    assert "layers=8" in repr(plan)
    assert "response_skipped=1" in repr(plan)
    assert plan.phase("prompt") is plan.prompt
    assert not plan.is_dense
    assert VoidPlan.dense(3).is_dense
    assert VoidPlan.dense(3).collapse() == VoidPlan.dense(3)
    assert plan.select_rows([1, 0]) == plan


def test_rows_of_a_plan() -> None:
    prompt = PhasePlan.dense(2)
    plan = VoidPlan(prompt, PhasePlan([[R, P], [P, R]], [[R, R], [S, R]]), source="by hand")
    picked = plan.select_rows([1, 1])
    assert picked.rows == 2
    assert picked.source == "by hand"
    assert picked.collapse() == VoidPlan(prompt, PhasePlan([P, R], [S, R])) == plan.row(1)


@pytest.mark.parametrize(
    ("phase", "prompt", "response"),
    [
        ("both", ("RSSR", "RSRS"), ("RSSR", "RSRS")),
        ("prompt", ("RPPR", "RSRS"), ("RRRR", "RRRR")),
        ("response", ("RRRR", "RRRR"), ("RSSR", "RSRS")),
    ],
)
def test_from_layers(phase: str, prompt: tuple[str, str], response: tuple[str, str]) -> None:
    plan = VoidPlan.from_layers(4, skip=[1], attention=iter([2]), mlp={3}, phase=phase)
    letters = {S: "S", P: "P", R: "R"}
    for half, expected in ((plan.prompt, prompt), (plan.response, response)):
        assert ("".join(letters[a] for a in half.attention), "".join(letters[a] for a in half.mlp)) == expected
    assert plan.source == f"from_layers(skip=[1], attention=[2], mlp=[3], phase={phase!r})"
    assert plan.fingerprint is None


def test_all_layers_or_none_may_be_named(model: Any) -> None:
    plan = VoidPlan.from_layers(model, skip=range(LAYERS))
    assert plan.prompt == plan.response == PhasePlan([S] * LAYERS, [S] * LAYERS)
    assert VoidPlan.from_layers(model).is_dense
    assert VoidPlan.from_layers(model, skip=[1], attention=[1]) == VoidPlan.from_layers(model, skip=[1])
    assert plan.fingerprint == Fingerprint.of(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"skip": [-1]}, ValueError, r"skip: expected layer indices >= 0 \(none counts from the end\), got -1"),
        ({"attention": [8]}, ValueError, "attention: expected layer indices below 8, got 8"),
        ({"mlp": [2, 5, 2]}, ValueError, "mlp: expected each layer once, got 2 twice"),
        ({"skip": [True]}, TypeError, r"skip: expected layer indices \(ints\), got bool True"),
        (
            {"skip": torch.tensor([False, True])},
            TypeError,
            r"skip: expected layer indices .*, got Tensor tensor\(False\)",
        ),
        ({"mlp": np.array([False, True])}, TypeError, r"mlp: expected layer indices \(ints\), got bool"),
        ({"skip": [1.0]}, TypeError, r"skip: expected layer indices \(ints\), got float 1.0"),
        ({"skip": 3}, TypeError, "skip: expected a list of layer indices, got int 3"),
        ({"mlp": "12"}, TypeError, "mlp: expected a list of layer indices, got str '12'"),
        ({"phase": "decode"}, ValueError, "phase: expected one of 'both', 'prompt', 'response', got 'decode'"),
    ],
)
def test_from_layers_refuses(options: Any, error: type[Exception], message: str, model: Any) -> None:
    with pytest.raises(error, match=message):
        VoidPlan.from_layers(model, **options)


def test_indices_may_be_any_integers(model: Any) -> None:
    for indices in (torch.tensor([2, 3]), np.array([2, 3])):
        assert VoidPlan.from_layers(model, skip=indices) == VoidPlan.from_layers(model, skip=[3, 2])


@pytest.mark.parametrize("wrong", [None, "llama", True, 2.0, torch.nn.Linear(2, 2)])
def test_what_is_no_model(wrong: Any) -> None:
    with pytest.raises(TypeError, match="model: expected a transformers model, got"):
        VoidPlan.from_layers(wrong)
    with pytest.raises(ValueError, match="number of layers >= 1, got 0"):
        VoidPlan.from_layers(0)


def test_plans_import_little() -> None:
    """Importing plans loads neither transformers nor the op library."""
    import subprocess
    import sys

    code = "import sys, void_ext.plan; print([m for m in ('transformers', 'void_ext.ops') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
