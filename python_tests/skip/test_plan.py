"""Plans: what they mean, which are legal, for which models, and which layers a trace makes them leave out."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
import pickle
import struct
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import void_ext
from void_ext import Action, PhasePlan, VoidPlan
from void_ext._plan_text import saved_flops, saved_reads
from void_ext.plan import Fingerprint, Weights

S, P, R = Action.SKIP, Action.PROJECT, Action.RUN
LAYERS = 8
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def build(stem: str = "Llama", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{stem}Config")(**{**CONFIG, **changes})
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


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


# ---- tables ----


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


def test_halves_of_a_plan_must_fit() -> None:
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


# ---- from_layers ----


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
    assert VoidPlan.from_layers(model, skip=torch.tensor([2, 3])) == VoidPlan.from_layers(model, skip=[3, 2])


@pytest.mark.parametrize("wrong", [None, "llama", True, 2.0, torch.nn.Linear(2, 2)])
def test_what_is_no_model(wrong: Any) -> None:
    with pytest.raises(TypeError, match="model: expected a transformers model, got"):
        VoidPlan.from_layers(wrong)
    with pytest.raises(ValueError, match="number of layers >= 1, got 0"):
        VoidPlan.from_layers(0)


# ---- fingerprints ----


def test_weights_are_counted_by_half(model: Any) -> None:
    weights = Fingerprint.of(model).weights
    for index, layer in enumerate(model.model.layers):
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in layer.named_children()}
        projections = sum(getattr(layer.self_attn, name).weight.numel() for name in ("k_proj", "v_proj"))
        assert weights.attention[index] == parts["self_attn"] + parts["input_layernorm"]
        assert weights.mlp[index] == parts["mlp"] + parts["post_attention_layernorm"]
        assert weights.project[index] == projections + parts["input_layernorm"]
    assert weights.other == model.lm_head.weight.numel()


@pytest.mark.parametrize(
    ("stem", "changes", "key_value"),
    [
        ("Qwen2", {}, 2 * 16 * 33),
        ("Qwen3", {"head_dim": 8}, 2 * 16 * 32 + 8),
        ("Phi3", {"pad_token_id": 0}, 2 * 16 * 32),
        ("GPTNeoX", {"num_key_value_heads": None}, 2 * 32 * 33),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}, 2 * 32 * 33),
    ],
)
def test_weights_of_other_families(stem: str, changes: Any, key_value: int) -> None:
    model = build(stem, **changes)
    found = Fingerprint.of(model)
    weights = found.weights
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)[0]
    assert weights.attention[0] + weights.mlp[0] == sum(p.numel() for p in layer.parameters())
    norm = 64 if stem in ("GPTNeoX", "OPT") else 32
    assert weights.project[0] == key_value + norm
    assert found.intermediate_size == 64


def test_norms_are_hashed_as_float32_in_order(model: Any) -> None:
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if name.endswith(("layernorm", "norm")):
            digest.update(b"".join(struct.pack("<f", value) for value in module.weight.tolist()))
    assert Fingerprint.of(model).norms == digest.hexdigest()
    # bfloat16 weights are exact in float32: loaded in either dtype they hash alike.
    half = build().bfloat16()
    assert Fingerprint.of(half).norms == Fingerprint.of(copy.deepcopy(half).float()).norms != digest.hexdigest()
    with void_ext.patch(model):
        assert Fingerprint.of(model).norms == digest.hexdigest()


def test_check_accepts_the_model_it_was_made_for(model: Any, recwarn: pytest.WarningsRecorder) -> None:
    VoidPlan.from_layers(model, skip=[3]).check(model)
    VoidPlan.from_layers(model, skip=[3]).check(build(seed=0))
    VoidPlan.from_layers(LAYERS, skip=[3]).check(build("Qwen2", hidden_size=64))
    assert not recwarn.list


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("stem", "changes", "message"),
    [
        ("Llama", {"num_hidden_layers": 7}, "got layers 7 instead of 8$"),
        (
            "Llama",
            {"hidden_size": 64, "vocab_size": 97},
            "hidden_size 64 instead of 32, head_dim 16 instead of 8, vocab_size 97 instead of 96",
        ),
        ("Llama", {"intermediate_size": 65}, "intermediate_size 65 instead of 64"),
        ("Llama", {"num_key_value_heads": 4}, "kv_heads 4 instead of 2"),
        ("Mistral", {}, "got model_type mistral instead of llama"),
    ],
)
def test_check_refuses_another_architecture(stem: str, changes: Any, message: str, force: bool, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        VoidPlan.from_layers(model, skip=[3]).check(build(stem, **changes), force=force)


def test_check_refuses_another_checkpoint_unless_forced(model: Any) -> None:
    plan = VoidPlan.from_layers(model, skip=[3])
    with pytest.raises(ValueError, match=r"norm weights are not those of the model the plan was made for.*force"):
        plan.check(build(seed=1))
    plan.check(build(seed=1), force=True)
    with pytest.raises(ValueError, match="made for 8 layers, got 7"):
        VoidPlan.dense(LAYERS).check(build(num_hidden_layers=7), force=True)
    with pytest.raises(TypeError, match="force: expected True or False, got str 'yes'"):
        plan.check(model, force="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a transformers model"):
        plan.check(torch.nn.Linear(2, 2))


def test_quantised_variants_only_warn(model: Any, recwarn: pytest.WarningsRecorder) -> None:
    plan = VoidPlan.from_layers(model, skip=[3])
    other = build(seed=1)
    other.config.quantization_config = {"quant_method": "some"}
    with pytest.warns(UserWarning, match="made for an unquantised model, this is a quantised one, its norm weights"):
        plan.check(other)
    same = build()
    same.config.quantization_config = {"quant_method": "some"}
    with pytest.warns(UserWarning, match="made for an unquantised model, this is a quantised one; voids may differ"):
        plan.check(same)
    with pytest.warns(UserWarning, match="made for a quantised model, this is an unquantised one; voids"):
        VoidPlan.from_layers(same).check(model)
    recwarn.clear()
    VoidPlan.from_layers(same).check(same)
    assert not recwarn.list


def test_weights_that_cannot_be_read_only_warn(model: Any) -> None:
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    assert Fingerprint.of(empty).norms == ""
    with pytest.warns(UserWarning, match="could not be read"):
        VoidPlan.from_layers(model).check(empty)


# ---- from_trace: the definition, in loops over Python floats ----


def table_of(traces: list[void_ext.Trace], phases: list[str], halves: bool) -> list[list[float]]:
    """Norms of each real token, from before the first unit to after the last."""
    found = []
    for trace, name in itertools.product(traces, phases):
        phase = getattr(trace, name)
        for b, t in itertools.product(*map(range, phase.mask.shape)):
            if phase.mask[b, t]:
                norms = phase.norms[b, t].tolist()
                if halves:
                    between = phase.halves[b, t].tolist()
                    norms = [norms[0]] + [n for pair in zip(between, norms[1:], strict=True) for n in pair]
                found.append(norms)
    return found


def is_void(norms: list[float], layer: int, alpha: float) -> bool:
    delta = torch.tensor(norms, dtype=torch.float32).diff()
    if layer == 0:
        return bool(delta[0] < 0)
    return bool(delta[layer] < torch.tensor(alpha) * (delta[:layer].max() - delta[:layer].min()))


def expected_units(
    traces: list[void_ext.Trace],
    phases: list[str],
    *,
    signal: str = "delta",
    alpha: float = 0.3,
    most: int | None = None,
    least: int = 0,
    protected: set[int] = frozenset({0, 1, LAYERS - 1}),  # type: ignore[assignment]
    halves: bool = False,
) -> set[int]:
    tokens = table_of(traces, phases, halves)
    updates = [
        getattr(trace, name).updates[b, t].tolist()
        for trace, name in itertools.product(traces, phases)
        for b, t in itertools.product(*map(range, getattr(trace, name).mask.shape))
        if getattr(trace, name).mask[b, t]
    ]
    ranked = []
    for unit in range(LAYERS * (2 if halves else 1)):
        if (unit // 2 if halves else unit) in protected:
            continue
        change = math.fsum(abs(n[unit + 1] - n[unit]) for n in tokens) / len(tokens)
        if signal == "delta":
            voids = sum(is_void(n, unit, alpha) for n in tokens)
            wanted = 2 * voids > len(tokens) if most is None else voids > 0
            ranked.append((-voids, change, unit, wanted))
            continue
        values = []
        for n, u in zip(tokens, updates, strict=True):
            before, after = n[unit], n[unit + 1]
            if signal == "abs_delta":
                values.append(abs(after - before))
            elif signal == "relative_update":
                values.append(u[unit] / before)
            else:
                values.append(1 - (before**2 + after**2 - u[unit] ** 2) / (2 * before * after))
        ranked.append((math.fsum(values) / len(values), change, unit, True))
    ranked.sort()
    taken = [entry for entry in ranked if entry[3]][:most]
    return {entry[2] for entry in taken} | {entry[2] for entry in ranked[:least]}


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


def test_from_trace_refuses_traces_that_cannot_tell(model: Any, traces: list[void_ext.Trace]) -> None:
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
        VoidPlan.from_trace(plain, build(num_hidden_layers=7))
    with pytest.raises(TypeError, match=r"trace: expected a void_ext\.Trace or a list of them, got PhaseTrace"):
        VoidPlan.from_trace(traces[0].prompt)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trace: expected at least one trace, got an empty list"):
        VoidPlan.from_trace([])
    small = build(num_hidden_layers=4)
    with void_ext.patch(small, granularity="batch", halves=True) as handle, torch.no_grad():
        small(input_ids=ids)
    assert handle.trace is not None
    with pytest.raises(ValueError, match="expected traces of one model, got 'llama' with 8 layers and 'llama' with 4"):
        VoidPlan.from_trace([plain, handle.trace])
    with pytest.raises(ValueError, match="halves: expected a trace with granularity 'token'"):
        VoidPlan.from_trace(handle.trace, halves=True)
    assert VoidPlan.from_trace(handle.trace, small, budget=1).fingerprint == Fingerprint.of(small)


# ---- describe ----


def test_savings_are_those_of_the_matrices() -> None:
    weights = Weights(attention=(100, 200), project=(10, 20), mlp=(300, 400), other=1000)
    plan = PhasePlan([P, S], [R, S])
    assert saved_flops(plan, weights, head=False) == (90 + 200 + 400) / 1000
    assert saved_flops(plan, weights, head=True) == saved_reads(plan, weights) == (90 + 200 + 400) / 2000
    # Each row computes what it needs; the step reads what any row needs.
    rows = PhasePlan([[P, S], [R, S]], [[S, S], [S, R]])
    assert saved_flops(rows, weights, head=True) == ((90 + 200 + 700) + (200 + 300)) / 2 / 2000
    assert saved_reads(rows, weights) == (0 + 200 + 300 + 0) / 2000
    assert saved_reads(PhasePlan([[P, S], [S, S]], [[S, R]] * 2), weights) == (90 + 200 + 300) / 2000


def test_describe(model: Any) -> None:
    plan = VoidPlan.from_layers(model, skip=[3], attention=[5], phase="prompt")
    weights = Fingerprint.of(model).weights
    total = sum(weights.attention) + sum(weights.mlp)
    saved = weights.attention[3] + weights.attention[5] - 2 * weights.project[3] + weights.mlp[3]
    assert plan.describe().splitlines() == [
        "plan for 8 layers of llama",
        "  from_layers(skip=[3], attention=[5], mlp=[], phase='prompt')",
        "",
        "                    0",
        "layer               01234567",
        "prompt        attn  ...P.P..",
        "              mlp   ...S....",
        "response      attn  ........",
        "              mlp   ........",
        "",
        ". runs   P keys and values for the cache alone (PROJECT)   S nothing (SKIP)",
        "",
        f"prompt: 1.5 of 8 layers off; saves {saved / total:.1%} of the FLOPs of a token",
        "response: 0 of 8 layers off; saves 0.0% of the weights read per step",
        "  (head included) and 0.0% of the FLOPs of a token",
        "2 FLOPs a weight; left out are attention scores, and the head in the prompt.",
    ]


def test_describe_wide_plans_and_many_rows() -> None:
    wide = VoidPlan.from_layers(126, skip=range(0, 126, 2)).describe().splitlines()
    assert max(map(len, wide)) == 80
    strips = [line for line in wide if line.startswith("prompt  ")]
    assert [len(line) for line in strips] == [80, 80, 26]
    assert "".join(line[20:] for line in strips) == "".join("S" if i % 2 == 0 else "." for i in range(126))
    assert any(line.strip() == "60        70        80        90        100       110" for line in wide)
    rows = VoidPlan(PhasePlan.dense(3), PhasePlan([[R, P, R]] * 7, [[R, S, R]] * 6 + [[R, R, R]]))
    lines = rows.describe().splitlines()
    assert lines[0] == "plan for 3 layers, 7 rows"
    assert [line for line in lines if "attn" in line][1:] == [f"response {i}    attn  .P." for i in range(4)]
    assert "response: and 3 more rows" in lines
    assert "response: 0.9286 of 3 layers off on average" in lines


def test_describe_prints_no_control_characters() -> None:
    dense = PhasePlan.dense(2)
    text = VoidPlan(dense, dense, None, "\x1b[2Jhello\r\n" + "x" * 5000).describe()
    assert "\x1b" not in text
    assert "\r" not in text
    assert "?[2Jhello??" in text
    assert len(text) < 1000


def test_plans_import_little() -> None:
    """Importing plans loads neither transformers nor the op library."""
    import subprocess
    import sys

    code = "import sys, void_ext.plan; print([m for m in ('transformers', 'void_ext.ops') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
