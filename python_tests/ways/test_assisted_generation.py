"""Assisted generation: candidates that were not taken leave no rows, whoever drafted them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import void_ext
from void_ext import PromptPlan

SETTINGS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}  # 4.57 takes no minimum with a draft


@pytest.mark.parametrize("who", ["another", "itself", "lookup"])
@pytest.mark.parametrize("skips", [None, "both", "prompt", "response"])
@pytest.mark.parametrize("ends", [False, True])
def test_tokens_and_rows(ends: bool, skips: str | None, who: str, tiny: Any, padded_batch: Any, some_plan: Any) -> None:
    """``ends``: at a token in the middle of what is drafted, so that candidates behind it were run in vain."""
    model = tiny("llama")
    ids = padded_batch[0][:1].repeat(1, 2)  # a prompt that repeats itself, to be looked up in
    draft = {
        "another": {"assistant_model": tiny("llama", seed=3)},
        "itself": {"assistant_model": model},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[who]
    settings = dict(SETTINGS)
    options = {"mode": "skip", "plan": some_plan(model, skips)} if skips else {}
    if ends:
        with void_ext.patch(model, **options):
            settings["eos_token_id"] = int(model.generate(ids, **SETTINGS)[0, 18 + 4])
    plain = model.generate(ids, **settings, **draft)
    with void_ext.patch(model, **options) as handle:
        usual = model.generate(ids, **settings)
        trace = handle.trace
        handle.reset()
        found = model.generate(ids, **settings, **draft)
    assert torch.equal(found, usual)
    assert found.shape[1] == (23 if ends else 26)
    if not skips:
        assert torch.equal(found, plain)
    assert trace is not None
    assert handle.trace is not None
    for phase in ("prompt", "response"):
        one, other = getattr(handle.trace, phase), getattr(trace, phase)
        real = slice(None), slice(0, other.mask.shape[1])
        assert bool(other.mask.all())
        assert torch.equal(one.tokens[real], other.tokens)
        assert bool(one.mask[real].all())
        assert not one.mask[:, other.mask.shape[1] :].any()
        assert torch.equal(one.executed[real], other.executed)
        torch.testing.assert_close(one.norms[real], other.norms, rtol=2e-5, atol=1e-5)


def test_a_policy_that_waits_for_the_prompt(tiny: Any, padded_batch: Any) -> None:
    """Candidates that run together with the prompt run dense; what it showed decides for those that follow."""
    model, ids = tiny("llama"), padded_batch[0][:1]
    executed = {}
    for assistant in (model, copy.deepcopy(model)):
        with void_ext.patch(model, mode="skip", policy=PromptPlan(budget=2, at_least=2)) as handle:
            model.generate(ids, **SETTINGS, assistant_model=assistant)
            executed[assistant] = handle.trace.response.executed[0], handle.counters.total.calls
            assert handle.counters.prompt.calls == 0  # each counts for the phase of its last token
    ran, calls = executed[model]
    dense = ran.all(-1).tolist()
    assert dense == sorted(dense, reverse=True)
    assert 0 < sum(dense) < len(dense)
    assert bool((ran[sum(dense) :].sum(-1) == 4).all())
    # What a model drafts for itself is not skipped, counted or traced, as if another had drafted it.
    other, others_calls = executed[assistant]
    assert torch.equal(ran, other)
    assert calls == others_calls


def test_a_generation_inside_of_another(tiny: Any, padded_batch: Any) -> None:
    """By a criterion, say: nothing of it is in the trace, and its ends are not those of the outer one's rows."""
    model = tiny("llama")
    ids, mask = padded_batch
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    class Asks(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            model.generate(ids[:, -3:], max_new_tokens=2, do_sample=False, pad_token_id=0)
            model(ids[:, -2:])
            return torch.zeros(len(ids), dtype=torch.bool)

    with void_ext.patch(model) as handle:
        expected = model.generate(ids, attention_mask=mask, **settings)
        wanted = handle.trace
        found = model.generate(ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([Asks()]), **settings)
    assert torch.equal(found, expected)
    for phase in ("prompt", "response"):
        one, other = getattr(handle.trace, phase), getattr(wanted, phase)
        assert one.positions == other.positions
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.norms, other.norms)


def test_a_patched_assistant(tiny: Any, padded_batch: Any) -> None:
    """An assistant is a model like any other: tokens stay, and its own forwards are in its own trace."""
    model, assistant = tiny("llama"), tiny("llama", seed=3)
    ids = padded_batch[0][:1]
    expected = model.generate(ids, **SETTINGS, assistant_model=assistant)
    with void_ext.patch(assistant) as handle:
        assert torch.equal(model.generate(ids, **SETTINGS, assistant_model=assistant), expected)
    assert handle.trace is not None
    assert handle.trace.prompt.norms.shape[-1] == 7
