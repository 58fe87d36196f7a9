"""Embeddings in place of tokens: the same rows, without tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

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


def test_one_row_without_a_mask(tiny: Any, padded_batch: Any) -> None:
    """Its embeddings alone tell where the prompt ends; the ids of generate() begin behind them."""
    model = tiny("llama")
    ids = padded_batch[0][:1]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with void_ext.patch(model) as handle:
        found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings)
    assert handle.trace is not None
    assert handle.trace.prompt.positions == list(range(9))
    assert torch.equal(handle.trace.response.tokens, found[:, :-1])
    assert bool(handle.trace.response.mask.all())


def test_a_model_that_embeds_by_itself(tiny: Any) -> None:
    """Vision-language models hand embeddings of tokens and images to their layers; the tokens are known anyway."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = tiny("llama").config
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=95, image_token_index=95, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(7))
    ids[:, 2:6] = 95  # an image of four patches
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 8, 8)}
    expected = model.generate(ids, **settings)
    with void_ext.patch(model) as handle:
        assert torch.equal(model.generate(ids, **settings), expected)
    assert handle.trace is not None
    assert torch.equal(handle.trace.prompt.tokens, ids)
    assert torch.equal(handle.trace.response.tokens, expected[:, 9:-1])


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
        usual = handle.trace
        # Written over tokens: a cache that was cropped.
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        cache.crop(-2)
        model(inputs_embeds=embeddings[:, :3], past_key_values=cache)
    assert trace is not None
    assert torch.equal(trace.prompt.mask, mask.bool())
    assert bool((trace.prompt.tokens == -1).all())
    assert torch.equal(trace.prompt.norms, usual.prompt.norms)
    assert torch.equal(handle.trace.prompt.tokens, torch.cat([ids[:, :2], ids.new_full((3, 3), -1)], 1))


def test_neither_tokens_nor_embeddings(tiny: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model), pytest.raises(RuntimeError, match="neither input_ids nor inputs_embeds"):
        model.model(use_cache=False)
