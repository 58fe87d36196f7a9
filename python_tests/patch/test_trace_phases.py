"""Where a trace begins, and which of its rows are prompt and which response."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import void_ext
from python_tests.patch.norms import close, norms_of
from void_ext.store import TraceStore

pytestmark = pytest.mark.usefixtures("ways_of_taking_norms")


@torch.no_grad()
def test_none_before_the_first_call_and_readable_after_unpatching(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    handle = void_ext.patch(model)
    assert handle.trace is None
    model(input_ids=ids, attention_mask=mask)
    handle.unpatch()
    trace = handle.trace
    assert trace is not None
    close(trace.prompt.norms, norms_of(model, ids, mask))
    assert torch.equal(trace.prompt.tokens, ids)
    assert torch.equal(trace.prompt.mask, mask.bool())
    assert trace.prompt.executed.shape == (3, 9, 6)
    assert bool(trace.prompt.executed.all())
    assert trace.response.norms.shape == (3, 0, 7)
    assert trace.response.active().shape == (3, 0, 6)
    assert bool(trace.response.usage().isnan().all())


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("cache", [None, "static"])
@torch.no_grad()
def test_generate_separates_prompt_and_response(
    cache: str | None, use_cache: bool, tiny: Any, padded_batch: Any
) -> None:
    if cache and not use_cache:
        pytest.skip("no cache to be static")
    model = tiny("llama")
    ids, mask = padded_batch
    with void_ext.patch(model) as handle:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            cache_implementation=cache,
        )
    trace = handle.trace
    assert trace is not None
    assert trace.prompt.positions == list(range(9))
    # Six tokens were generated; the last one was never consumed.
    assert trace.response.positions == list(range(9, 14))
    assert torch.equal(trace.response.tokens, output[:, 9:14])
    assert torch.equal(trace.prompt.tokens, ids)
    assert torch.equal(trace.prompt.mask, mask.bool())
    full = torch.cat([mask, mask.new_ones(3, 5)], 1)
    expected = norms_of(model, output[:, :14], full, position_ids=(full.cumsum(1) - 1).clamp_min(0))
    real = full[:, :9].bool()
    close(trace.prompt.norms[real], expected[:, :9][real], rtol=1e-4)
    close(trace.response.norms, expected[:, 9:], rtol=1e-4)


@torch.no_grad()
def test_chunked_prefill_is_all_prompt(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1]
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with void_ext.patch(model) as handle:
        model.generate(input_ids=ids, **settings)
        whole = handle.trace
        model.generate(input_ids=ids, prefill_chunk_size=4, **settings)
        chunked = handle.trace
    assert whole is not None
    assert chunked is not None
    assert chunked.prompt.positions == whole.prompt.positions
    assert chunked.response.positions == whole.response.positions
    close(chunked.prompt.norms, whole.prompt.norms, rtol=1e-4)


@pytest.mark.parametrize("make_cache", [None, DynamicCache, StaticCache])
@torch.no_grad()
def test_plain_calls(make_cache: Any, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1]
    expected = norms_of(model, ids)
    with void_ext.patch(model) as handle:
        if make_cache is None:
            cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        else:
            cache = make_cache(config=model.config, **({"max_cache_len": 32} if make_cache is StaticCache else {}))
            model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        first = handle.trace
        model(input_ids=ids[:, 4:7], past_key_values=cache, use_cache=True)  # several tokens: still prompt
        model(input_ids=ids[:, 7:8], past_key_values=cache, use_cache=True)  # one token: response
        with handle.phase("prompt"):
            model(input_ids=ids[:, 8:9], past_key_values=cache, use_cache=True)
        trace = handle.trace
        assert trace is not None
        assert first is not None
        assert trace.prompt.positions == [0, 1, 2, 3, 4, 5, 6, 8]
        assert trace.response.positions == [7]
        close(trace.prompt.norms[:, :7], expected[:, :7], rtol=1e-4)
        close(trace.response.norms, expected[:, 7:8], rtol=1e-4)
        model(input_ids=ids[:, :2])  # without a cache: a new trace
        newer = handle.trace
        assert newer is not None
        assert newer.prompt.positions == [0, 1]
        assert trace.response.positions == [7]
        handle.reset()
        assert handle.trace is None


@torch.no_grad()
def test_cropping_overwrites_rows(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1]
    with void_ext.patch(model) as handle:
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache.crop(-4)
        model(input_ids=ids[:, 1:4], past_key_values=cache, use_cache=True)
        trace = handle.trace
    assert trace is not None
    assert trace.prompt.positions == list(range(8))
    assert trace.prompt.tokens[0].tolist() == ids[0, :5].tolist() + ids[0, 1:4].tolist()


@torch.no_grad()
def test_going_on_with_a_conversation(tiny: Any, padded_batch: Any) -> None:
    """A second generate() on the same cache: what was generated before belongs to the prompt now."""
    model = tiny("llama")
    ids = padded_batch[0][:1]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with void_ext.patch(model) as handle:
        first = model.generate(input_ids=ids, **settings)
        longer = torch.cat([first.sequences, ids[:, :3]], 1)
        model.generate(
            input_ids=longer, attention_mask=torch.ones_like(longer), past_key_values=first.past_key_values, **settings
        )
        trace = handle.trace
    assert trace is not None
    assert trace.prompt.positions == list(range(longer.shape[1]))
    assert torch.equal(trace.prompt.tokens, longer)
    assert trace.response.positions == list(range(longer.shape[1], longer.shape[1] + 3))
    close(trace.prompt.norms, norms_of(model, longer), rtol=1e-4)


@torch.no_grad()
def test_embeddings_have_no_tokens(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    embeds = model.get_input_embeddings()(ids)
    with void_ext.patch(model) as handle:
        model(inputs_embeds=embeds, attention_mask=mask)
        assert handle.trace is not None
        assert bool((handle.trace.prompt.tokens == -1).all())
        model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert handle.trace.prompt.positions == list(range(9))
        assert bool((handle.trace.prompt.tokens == -1).all())
        assert bool((handle.trace.response.tokens >= 0).all())


@torch.no_grad()
def test_assisted_generation(tiny: Any, padded_batch: Any) -> None:
    """Candidates that were rejected leave no rows behind."""
    model, assistant = tiny("llama"), tiny("llama", seed=1)
    ids = padded_batch[0][:1]
    settings = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    plain = model.generate(input_ids=ids, **settings)
    with void_ext.patch(model) as handle:
        output = model.generate(input_ids=ids, assistant_model=assistant, **settings)
    assert torch.equal(output, plain)
    trace = handle.trace
    assert trace is not None
    assert trace.prompt.positions == list(range(9))
    consumed = trace.response.tokens.shape[1]
    assert consumed >= 7
    assert torch.equal(trace.response.tokens[:, :7], output[:, 9:16])


def test_what_was_cropped_is_not_real_where_nobody_wrote_again() -> None:
    """Calls that the patch does not see may fill a cache between two that it does."""
    store = TraceStore(1, 2, torch.device("cpu"))
    norms = {"norms": torch.ones(1, 6, 3)}
    store.write(0, 6, [0] * 6, 0, norms, None, None)
    store.crop(2)
    store.write(4, 1, [1], 1, {"norms": norms["norms"][:, :1]}, None, None)
    assert store.view("mask").tolist() == [[True, True, False, False, True]]
