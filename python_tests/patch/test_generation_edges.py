"""Corners of generate(): other forwards inside of it, rows that end in unusual ways, caches that come back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from transformers import StaticCache, StoppingCriteria, StoppingCriteriaList

import void_ext
from python_tests.generation import Forced, stop_at
from python_tests.patch.norms import close, norms_of

EOS = 2
OLD = int(transformers.__version__.split(".")[0]) < 5


def response_mask(model: Any, ids: torch.Tensor, rows: list[list[int]], **settings: Any) -> list[list[bool]]:
    with void_ext.patch(model) as handle:
        model.generate(
            input_ids=ids[: len(rows)],
            attention_mask=torch.ones_like(ids[: len(rows)]),
            logits_processor=[Forced(rows)],
            max_new_tokens=max(map(len, rows)),
            **settings,
        )
    assert handle.trace is not None
    return handle.trace.response.mask.tolist()


def test_pad_that_is_also_eos(tiny: Any, padded_batch: Any) -> None:
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)
    for extra in ({}, {"max_time": 100.0}, {"stopping_criteria": stop_at(99)}):
        assert response_mask(model, ids, [[5, 6, EOS, 0, 0, 0]], pad_token_id=EOS, **extra) == [[True, True]]
        both = response_mask(model, ids, [[5, 6, EOS], [5, 6, 7, 8, 9]], pad_token_id=EOS, **extra)
        assert both == [[True, True, False, False], [True, True, True, True]]


def test_generated_pads_end_nothing(tiny: Any, padded_batch: Any) -> None:
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)
    rows = [[5, 6, 0, 0], [5, 6, 7, 0]]
    assert response_mask(model, ids, rows, stopping_criteria=stop_at(33)) == [[True] * 3] * 2


def test_criteria_without_an_eos(tiny: Any, padded_batch: Any) -> None:
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)
    rows = [[5, 33, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10]]
    mask = response_mask(model, ids, rows, stopping_criteria=stop_at(33), eos_token_id=None)
    assert mask == [[True, False, False, False, False], [True] * 5]


@pytest.mark.skipif(OLD, reason="transformers 4.57: generate() fails there, patched or not")
def test_new_tokens_alone_on_a_cache(tiny: Any, padded_batch: Any) -> None:
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)[:1]
    with void_ext.patch(model) as handle:
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        model.generate(
            input_ids=ids[:, :3],
            attention_mask=torch.ones(1, 12, dtype=torch.long),
            past_key_values=cache,
            max_new_tokens=4,
            logits_processor=[Forced([[5, 6, 7, 8]])],
            stopping_criteria=stop_at(99),
        )
    assert handle.trace is not None
    assert handle.trace.prompt.positions == list(range(12))
    assert handle.trace.response.mask.tolist() == [[True, True, True]]


@torch.no_grad()
def test_ends_of_a_generation_do_not_reach_later_calls(tiny: Any, padded_batch: Any) -> None:
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)[:1]
    with void_ext.patch(model) as handle:
        output = model.generate(
            input_ids=ids,
            max_new_tokens=8,
            logits_processor=[Forced([[5, 6, EOS]])],
            return_dict_in_generate=True,
        )
        cache = output.past_key_values
        for token in (EOS, 9):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    assert handle.trace is not None
    assert handle.trace.response.tokens.tolist() == [[5, 6, EOS, 9]]
    assert handle.trace.response.mask.tolist() == [[True] * 4]


@torch.no_grad()
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_the_second_turn_of_a_batch_says_what_was_real(kept: bool, padded: bool, tiny: Any, padded_batch: Any) -> None:
    """Its mask holds for the first turn's tokens too, whether they run again or their cache was kept."""
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)[:2]
    with void_ext.patch(model) as handle:
        first = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            logits_processor=[Forced([[5, EOS], [5, 6, 7, 8]])],
            return_dict_in_generate=True,
        )
        assert handle.trace is not None
        assert handle.trace.response.mask.tolist() == [[True, False, False], [True, True, True]]
        longer = torch.cat([first.sequences, ids[:, :2]], 1)
        mask = torch.ones_like(longer)
        if padded:
            mask[0, 11:13] = 0  # the pads; the eos before them belongs to the conversation
            mask[1, 2:4] = 0  # they were real in the first turn
        model.generate(
            input_ids=longer,
            attention_mask=mask,
            past_key_values=first.past_key_values if kept else None,
            max_new_tokens=2,
            do_sample=False,
        )
    trace = handle.trace
    assert trace is not None
    assert torch.equal(trace.prompt.mask, mask.bool())
    # The eos was consumed beside the other row: its norms are those of a token of the conversation.
    close(trace.prompt.norms[0, :11], norms_of(model, longer[:1, :11])[0], rtol=1e-4)


@torch.no_grad()
def test_a_turn_makes_nothing_real_that_was_not_recorded(tiny: Any, padded_batch: Any) -> None:
    """What was in the cache before the patch has no norms."""
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)[:2]
    first = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with void_ext.patch(model) as handle:
        for _ in range(2):
            longer = torch.cat([first.sequences, ids[:, :2]], 1)
            first = model.generate(
                input_ids=longer,
                attention_mask=torch.ones_like(longer),
                past_key_values=first.past_key_values,
                max_new_tokens=2,
                do_sample=False,
                return_dict_in_generate=True,
            )
        recorder = handle._recorders.own
        assert recorder.store is not None
        unseen = [position for position, phase in enumerate(recorder.store.phase) if phase < 0]
        assert unseen
        mask = recorder.store.view("mask")
        assert not mask[:, unseen].any()
        assert mask[:, unseen[-1] + 1 :].all()


def test_other_forwards_inside_generate_have_no_rows(tiny: Any, padded_batch: Any) -> None:
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)[:1]

    class Looks(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            model(input_ids=ids[:, -4:])
            return torch.zeros(len(ids), dtype=torch.bool)

    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with void_ext.patch(model) as handle:
        model.generate(input_ids=ids, stopping_criteria=StoppingCriteriaList([Looks()]), **settings)
        assert handle.trace is not None
        assert handle.trace.prompt.positions == list(range(9))
        assert handle.trace.response.positions == list(range(9, 13))
        output = model.generate(input_ids=ids, guidance_scale=1.5, **settings)
        assert handle.trace.prompt.positions == list(range(9))
        assert torch.equal(handle.trace.prompt.tokens, ids)
        assert torch.equal(handle.trace.response.tokens, output[:, 9:13])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_static_cache_that_was_reset_is_empty(mode: Any, tiny: Any, padded_batch: Any) -> None:
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)[:1]
    cache = StaticCache(config=model.config, max_cache_len=12)
    with void_ext.patch(model) as handle, mode():
        for length in (9, 5, 7):
            model(input_ids=ids[:, :length], past_key_values=cache, use_cache=True)
            assert handle.trace is not None
            assert handle.trace.prompt.positions == list(range(length))
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            assert handle.trace.response.positions == [length]
            cache.reset()


@pytest.mark.parametrize("granularity", ["sequence", "batch"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@torch.no_grad()
def test_padding_that_is_not_finite_has_no_say(value: float, granularity: str, tiny: Any, padded_batch: Any) -> None:
    model, (ids, mask) = tiny("llama"), padded_batch
    real = mask.bool()
    found = []
    for fill in (0.0, value):
        hook = model.model.layers[-1].mlp.register_forward_hook(
            lambda module, given, output, fill=fill: output.masked_fill(~real[..., None], fill)
        )
        with void_ext.patch(model, mode="exit", alpha=0.3, granularity=granularity) as handle:
            logits = model(input_ids=ids, attention_mask=mask).logits
        hook.remove()
        assert handle.trace is not None
        prompt = handle.trace.prompt
        assert bool(prompt.norms[..., -1][~real].isfinite().all()) == (fill == 0)
        found.append((logits[real], prompt.active()[real], prompt.usage()))
    for clean, beside in zip(*found, strict=True):
        assert torch.equal(clean, beside)


@pytest.mark.parametrize("granularity", ["sequence", "batch"])
@torch.no_grad()
def test_exit_decides_on_the_rows_that_the_trace_counts(granularity: str, tiny: Any, padded_batch: Any) -> None:
    """What the final norm was given is the output of the last layer that the trace calls active, ended rows or not."""
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)
    rows = [[5, EOS], [5, 6, 7, 8, 9, 10], [5, 6, 7, EOS]]
    streams: list[list[torch.Tensor]] = []
    given: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, a, o: streams[-1].append(o)) for layer in model.model.layers]
    hooks.append(model.model.layers[0].register_forward_pre_hook(lambda m, a: streams.append([a[0]])))
    with void_ext.patch(model, mode="exit", alpha=0.3, granularity=granularity) as handle:
        hooks.append(model.model.norm.register_forward_pre_hook(lambda m, a: given.append(a[0])))
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, logits_processor=[Forced(rows)]
        )
    for hook in hooks:
        hook.remove()
    assert handle.trace is not None
    active = torch.cat([handle.trace.prompt.active(), handle.trace.response.active()], 1)
    mask = torch.cat([handle.trace.prompt.mask, handle.trace.response.mask], 1)
    stacked = torch.cat([torch.stack(layers, 2) for layers in streams], 1)  # [B, T, L + 1, D]
    index = (active * torch.arange(1, 7)).amax(-1)
    expected = stacked.gather(2, index[..., None, None].expand(-1, -1, 1, stacked.shape[-1]))[:, :, 0]
    actual = torch.cat(given, 1)
    assert torch.equal(actual[mask], expected[mask])
