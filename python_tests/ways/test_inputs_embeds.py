"""Embeddings in place of tokens: the same rows, without tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(cache: str | None, skips: bool, tiny: Any, greedy: Any, padded_batch: Any, some_plan: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    embeddings = model.get_input_embeddings()(ids).detach()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}

    def run() -> torch.Tensor:
        return model.generate(inputs_embeds=embeddings, attention_mask=mask, **settings)

    plain = run()
    options = {"mode": "skip", "plan": some_plan(model)} if skips else {}
    with void_ext.patch(model, **options) as handle:
        from_tokens = greedy(model, cache_implementation=cache)[:, 9:]
        usual = handle.trace
        found = run()
        trace = handle.trace
    assert torch.equal(found, from_tokens)
    if not skips:
        assert torch.equal(found, plain)
    assert usual is not None
    assert trace is not None
    assert bool((trace.prompt.tokens == -1).all())
    assert torch.equal(trace.response.tokens, found[:, :-1])
    for phase in ("prompt", "response"):
        one, other = getattr(trace, phase), getattr(usual, phase)
        assert one.positions == other.positions
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.norms, other.norms)
        assert torch.equal(one.executed, other.executed)


@torch.no_grad()
def test_one_call(tiny: Any, padded_batch: Any) -> None:
    model = tiny("gpt2")
    ids, mask = padded_batch
    embeddings = model.get_input_embeddings()(ids)
    expected = model(inputs_embeds=embeddings, attention_mask=mask).logits
    with void_ext.patch(model) as handle:
        assert torch.equal(model(inputs_embeds=embeddings, attention_mask=mask).logits, expected)
        trace = handle.trace
        model(input_ids=ids, attention_mask=mask)
    assert trace is not None
    assert torch.equal(trace.prompt.mask, mask.bool())
    assert bool((trace.prompt.tokens == -1).all())
    assert torch.equal(trace.prompt.norms, handle.trace.prompt.norms)
