"""A prompt in several forwards is a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import void_ext
from void_ext import PromptPlan

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
