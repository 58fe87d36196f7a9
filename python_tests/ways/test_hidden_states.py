"""``output_hidden_states`` and ``output_attentions``: what a patched model shows of its inside is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext
from void_ext import VoidPlan
from void_ext.testing.compare import assert_bits_equal


@pytest.mark.usefixtures("ways_of_taking_norms")
@pytest.mark.parametrize("fuse", ["add", "norm"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_of_one_call(family: str, fuse: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny(family)
    ids, mask = padded_batch
    expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    with void_ext.patch(model, fuse=fuse) as handle:
        found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert handle.trace is not None
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if fuse == "add":
            assert_bits_equal(ours, theirs, f"hidden state {index}")
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        if index < 6:  # the last one is already normed
            wanted = theirs.double().norm(dim=-1).float()
            torch.testing.assert_close(handle.trace.prompt.norms[..., index], wanted, rtol=2e-5, atol=1e-5)


@pytest.mark.usefixtures("ways_of_taking_norms")
@pytest.mark.parametrize("skips", [False, True])
def test_of_generate(skips: bool, tiny: Any, greedy: Any, some_plan: Any) -> None:
    model = tiny("llama")
    settings = {"output_hidden_states": True, "return_dict_in_generate": True}
    expected = greedy(model, **settings)
    options = {"mode": "skip", "plan": some_plan(model)} if skips else {}
    with void_ext.patch(model, **options) as handle:
        found = greedy(model, **settings)
    assert handle.trace is not None
    tables = (handle.trace.prompt.norms, *handle.trace.response.norms.split(1, 1))
    assert len(found.hidden_states) == len(tables)
    for step, (states, norms) in enumerate(zip(found.hidden_states, tables, strict=True)):
        assert len(states) == 7
        for index, state in enumerate(states[:-1]):
            wanted = state.double().norm(dim=-1).float()
            torch.testing.assert_close(norms[..., index], wanted, rtol=2e-5, atol=1e-5)
            if not skips:
                assert_bits_equal(state, expected.hidden_states[step][index], f"step {step}, hidden state {index}")
        if skips:
            assert torch.equal(states[3], states[2])  # layer 2 is off


@torch.no_grad()
def test_attentions(tiny: Any, padded_batch: Any) -> None:
    """All of them, or none: an entry for each layer that ran would be taken for the entries of the first layers."""
    model = tiny("llama", attention="eager")
    ids, mask = padded_batch
    expected = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    with void_ext.patch(model):
        found = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    assert len(found) == 6
    assert all(map(torch.equal, found, expected))
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, mlp=[2])):
        assert len(model(input_ids=ids, output_attentions=True).attentions) == 6
    for phase in ("both", "prompt"):
        plan = VoidPlan.from_layers(model, attention=[2], phase=phase)
        with void_ext.patch(model, mode="skip", plan=plan) as handle:
            with pytest.raises(ValueError, match="output_attentions: expected False"):
                model(input_ids=ids, output_attentions=True)
            assert handle.trace is None
            model(input_ids=ids)
            model.config.output_attentions = True
            with pytest.raises(ValueError, match="output_attentions: expected False"):
                model(input_ids=ids)
            model.config.output_attentions = False


def test_forwards_left_on_the_instance(tiny: Any, greedy: Any, some_plan: Any) -> None:
    """transformers 4.57 captures hidden states by forwards of its own, and leaves the class's bound to the instance."""
    model = tiny("llama")
    expected = greedy(model)
    for layer in model.model.layers:
        for module in (layer, layer.self_attn):
            module.forward = type(module).forward.__get__(module)
    left = model.model.layers[0].forward
    with void_ext.patch(model) as handle:
        assert "fused (fuse='add')" in handle.describe()
        assert torch.equal(greedy(model), expected)
    assert model.model.layers[0].forward is left
    with void_ext.patch(model, mode="skip", plan=some_plan(model)) as handle:
        greedy(model)
        assert handle.counters.response.attention_skipped > 0
