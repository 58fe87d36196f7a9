"""A prompt in several forwards is a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import void_ext
from void_ext import PromptPlan
from void_ext.testing.compare import assert_bits_equal

#: with left padding, transformers 4.57 gives a chunked prompt other positions than a whole one
CHUNKS_AGREE = int(transformers.__version__.split(".")[0]) >= 5


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("chunk", [1, 4, 20])
def test_traced(
    chunk: int, cache: str | None, tiny: Any, greedy: Any, usual_trace: Any, same_trace: Any, padded_batch: Any
) -> None:
    model = tiny("llama")
    settings = {"prefill_chunk_size": chunk, "cache_implementation": cache}
    expected = greedy(model, **settings)
    with void_ext.patch(model) as handle:
        assert torch.equal(greedy(model, **settings), expected)
    assert handle.trace is not None
    assert handle.trace.prompt.positions == list(range(9))
    assert handle.trace.response.positions == list(range(9, 14))
    if CHUNKS_AGREE:
        same_trace(handle.trace, usual_trace(model), exact=False)  # products of other shapes round differently


@pytest.mark.skipif(not CHUNKS_AGREE, reason="transformers 4.57: chunks of a padded prompt have other positions")
@pytest.mark.parametrize("chunk", [2, 4])
def test_skipped(chunk: int, tiny: Any, greedy: Any, usual_trace: Any, same_trace: Any, some_plan: Any) -> None:
    model = tiny("llama")
    for options in ({"plan": some_plan(model)}, {"policy": PromptPlan(budget=2, at_least=2)}):
        with void_ext.patch(model, mode="skip", **options) as handle:
            expected = greedy(model)
            handle.counters.reset()
            assert torch.equal(greedy(model, prefill_chunk_size=chunk), expected)
            assert handle.counters.prompt.calls == -(-9 // chunk)
        assert not handle.trace.response.executed.all()
        same_trace(handle.trace, usual_trace(model, mode="skip", **options), exact=False)


@torch.no_grad()
def test_by_hand(tiny: Any, padded_batch: Any) -> None:
    """In a loop of one's own, where each call may be given the mask of the whole prompt."""
    model = tiny("llama")
    ids, mask = padded_batch
    positions = (mask.cumsum(1) - 1).clamp_min(0)

    def logits() -> torch.Tensor:
        found, cache = [], None
        for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
            where = {"attention_mask": mask, "position_ids": positions[:, part]}
            output = model(ids[:, part], past_key_values=cache, use_cache=True, **where)
            found.append(output.logits)
            cache = output.past_key_values
        return torch.cat(found, 1)

    expected = logits()
    with void_ext.patch(model) as handle:
        assert_bits_equal(logits(), expected, "logits")
        trace = handle.trace
        model(ids, attention_mask=mask, position_ids=positions)
        whole = handle.trace
    assert trace.prompt.positions == list(range(9))
    assert torch.equal(trace.prompt.mask, mask.bool())
    assert torch.equal(trace.prompt.tokens, ids)
    real = mask.bool()
    torch.testing.assert_close(trace.prompt.norms[real], whole.prompt.norms[real], rtol=2e-5, atol=1e-5)
