"""Skipping through generate(): sampling, beams, assisted generation, several sequences, turns; and the way back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import void_ext
from void_ext.patching.ledger import CacheHoleError
from void_ext.plan import Action, PhasePlan, VoidPlan

LAYERS = 6
RUN, PROJECT, SKIP = Action.RUN, Action.PROJECT, Action.SKIP


def by_row(rows: int) -> VoidPlan:
    attention = tuple(
        tuple(PROJECT if (layer + row) % 3 == 0 else RUN for layer in range(LAYERS)) for row in range(rows)
    )
    mlp = tuple(tuple(SKIP if a == PROJECT else RUN for a in row) for row in attention)
    return VoidPlan(
        prompt=VoidPlan.dense(LAYERS).prompt, response=PhasePlan(attention, mlp), fingerprint=None, source="test"
    )


def generate(model: Any, batch: Any, **settings: Any) -> torch.Tensor:
    ids, mask = batch
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    return model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_row_in_a_batch_is_the_row_alone(cache: str | None, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    plan = by_row(3)
    with void_ext.patch(model, mode="skip", plan=plan) as handle:
        together = generate(model, padded_batch, min_new_tokens=6, cache_implementation=cache)
        trace = handle.trace
    for row in range(3):
        alone = VoidPlan(
            prompt=plan.prompt,
            response=PhasePlan((plan.response.attention[row],), (plan.response.mlp[row],)).collapse(),
            fingerprint=None,
            source="test",
        )
        with void_ext.patch(model, mode="skip", plan=alone) as handle:
            single = generate(
                model, (ids[row : row + 1], mask[row : row + 1]), min_new_tokens=6, cache_implementation=cache
            )
            assert torch.equal(single[0], together[row])
            assert torch.equal(handle.trace.response.executed[0], trace.response.executed[row])
            torch.testing.assert_close(handle.trace.response.norms[0], trace.response.norms[row], atol=1e-4, rtol=1e-4)


def test_sampling_is_the_same_with_the_same_seed(tiny: Any, padded_batch: Any) -> None:
    model = tiny("mistral")
    plan = VoidPlan.from_layers(model, skip=[2], mlp=[4])
    outputs = []
    for _ in range(2):
        with void_ext.patch(model, mode="skip", plan=plan):
            torch.manual_seed(1)
            outputs.append(generate(model, padded_batch, do_sample=True, temperature=0.8))
    assert torch.equal(*outputs)


def test_beams_with_one_plan_for_all(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    settings = {"num_beams": 3, "num_return_sequences": 2}
    small = tiny("llama")
    small.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(small.model.layers) if i != 2)
    for index, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = index
    small.config.num_hidden_layers = LAYERS - 1
    expected = generate(small, padded_batch, **settings)
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2])) as handle:
        assert torch.equal(generate(model, padded_batch, **settings), expected)
        assert not handle.trace.ordered


def test_beams_with_rows_that_differ_are_refused(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model, mode="skip", plan=by_row(3)) as handle:
        with pytest.raises(ValueError, match="beam search moves rows"):
            generate(model, padded_batch, num_beams=3)
        assert handle.trace is None
        assert handle.counters.total.calls == 0
        generate(model, padded_batch)


def test_rows_must_be_those_of_the_batch(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model, mode="skip", plan=by_row(2)):
        cache = DynamicCache(config=model.config)
        with pytest.raises(ValueError, match="for 3 rows or for all alike, got one for 2"):
            generate(model, padded_batch, past_key_values=cache)


def test_several_sequences_of_one_prompt(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[1], phase="response")) as handle:
        torch.manual_seed(0)
        out = generate(model, padded_batch, do_sample=True, num_return_sequences=2)
    assert out.shape[0] == 6
    assert handle.trace.response.norms.shape[0] == 6


def test_assisted_generation(tiny: Any, padded_batch: Any) -> None:
    model, assistant = tiny("llama"), tiny("llama", seed=3)
    ids = padded_batch[0][:1]
    plan = VoidPlan.from_layers(model, skip=[1, 4])
    with void_ext.patch(model, mode="skip", plan=plan):
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)
        found = model.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_second_turn_with_the_same_cache(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1]
    for plan, holds in (
        (VoidPlan.from_layers(model, skip=[1, 4]), True),
        (VoidPlan.from_layers(model, mlp=[1, 4], phase="response"), True),
        (VoidPlan.from_layers(model, skip=[1, 4], phase="response"), False),
    ):
        cache = DynamicCache(config=model.config)
        with void_ext.patch(model, mode="skip", plan=plan) as handle:
            first = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=cache)
            turn = torch.cat([first, ids], 1)
            if not holds:
                with pytest.raises(CacheHoleError, match="layer 1 holds"):
                    model.generate(turn, max_new_tokens=3, do_sample=False, past_key_values=cache)
                continue
            second = model.generate(turn, max_new_tokens=3, do_sample=False, past_key_values=cache)
            assert handle.trace.prompt.executed.shape[1] == turn.shape[1]
            handle.reset()
            if plan.prompt == plan.response:
                again = model.generate(turn, max_new_tokens=3, do_sample=False)
                assert torch.equal(again, second)


def state(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            inner = key.startswith("_") and isinstance(value, dict)
            found[f"{name}.{key}"] = tuple((k, id(v)) for k, v in value.items()) if inner else id(value)
        found[f"{name} forward"] = type(module).forward
    found["config"] = model.config.to_json_string()
    found["generation_config"] = model.generation_config.to_json_string()
    return found


@pytest.mark.parametrize("cache", [None, "static"])
def test_unpatched_is_exactly_as_found(cache: str | None, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    plain = generate(model, padded_batch, cache_implementation=cache)
    before = state(model)
    before.pop("._cache", None)  # generate() keeps a static cache there in transformers 4.57
    handle = void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[0, 3]))
    generate(model, padded_batch, cache_implementation=cache)
    void_ext.unpatch(model)
    after = state(model)
    after.pop("._cache", None)
    assert after == before
    assert torch.equal(generate(model, padded_batch, cache_implementation=cache), plain)
    assert handle.counters.response.layers_skipped > 0
    assert handle.trace is not None


def test_training_runs_everything(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, _ = padded_batch
    expected = model(ids, use_cache=False).logits
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[0, 3])) as handle:
        model.train()
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        assert handle.counters.total.calls == 0
        model.eval()
        model(ids, use_cache=False).logits.sum().backward()  # gradients flow through what ran, and only there
    assert model.model.layers[1].mlp.up_proj.weight.grad is not None
    assert model.model.layers[3].mlp.up_proj.weight.grad is None


def test_copies_of_a_patched_model_skip_too(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2])) as handle:
        expected = generate(model, padded_batch)
        twin = copy.deepcopy(model)
        calls = handle.counters.total.calls
        assert torch.equal(generate(twin, padded_batch), expected)
        assert handle.counters.total.calls == calls
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        restored = torch.load(buffer, weights_only=False)
        assert torch.equal(generate(restored, padded_batch), expected)
    assert pickle.dumps(handle.counters)


@pytest.mark.parametrize(
    ("family", "options", "error", "message"),
    [
        ("gpt2", {"plan": VoidPlan.dense(6)}, ValueError, "mode: 'skip' needs a model with a fused forward"),
        ("llama", {}, ValueError, "expected one of them with mode='skip', got neither"),
        ("llama", {"plan": VoidPlan.dense(6), "policy": object()}, ValueError, "got both"),
        ("llama", {"plan": "plan.json"}, TypeError, "plan: expected a VoidPlan"),
        ("llama", {"policy": object()}, TypeError, "policy: expected an object with a method decide"),
        ("llama", {"plan": VoidPlan.dense(7)}, ValueError, "7 layers"),
        ("llama", {"plan": VoidPlan.dense(6), "reference_quirks": True}, ValueError, "reference_quirks"),
        ("llama", {"plan": VoidPlan.dense(6), "mode": "trace"}, ValueError, "plan: expected mode='skip'"),
    ],
)
def test_what_is_refused(family: str, options: dict[str, Any], error: type, message: str, tiny: Any) -> None:
    model = tiny(family)
    before = state(model)
    with pytest.raises(error, match=message):
        void_ext.patch(model, **{"mode": "skip", **options})
    assert state(model) == before
