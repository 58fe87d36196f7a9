"""Beam search moves rows between beams unseen: tokens stay right, and the trace says that its rows are in no order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import void_ext
from void_ext import Action, History, PhasePlan, Policy, PromptPlan, VoidPlan

BEAMS = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize(("family", "cache"), [("llama", None), ("llama", "static"), ("gpt2", None)])
def test_traced(family: str, cache: str | None, tiny: Any, greedy: Any, padded_batch: Any) -> None:
    model = tiny(family)
    expected = greedy(model, cache_implementation=cache, **BEAMS)
    with void_ext.patch(model) as handle:
        assert torch.equal(greedy(model, cache_implementation=cache, **BEAMS), expected)
        trace = handle.trace
        assert trace is not None
        assert not trace.ordered
        # Rows of the prompt are still where they were: three beams of each.
        assert torch.equal(trace.prompt.tokens, padded_batch[0].repeat_interleave(3, 0))
        assert torch.equal(trace.prompt.mask, padded_batch[1].bool().repeat_interleave(3, 0))
        assert trace.response.norms.shape == (9, 5, 7)
        greedy(model)
        assert handle.trace is not None
        assert handle.trace.ordered
        config = transformers.GenerationConfig(**BEAMS, max_new_tokens=2, pad_token_id=0)
        model.generate(padded_batch[0], config)
        assert not handle.trace.ordered


def test_skipped_with_one_plan_for_all(tiny: Any, greedy: Any) -> None:
    model, lacking = tiny("llama"), tiny("llama")
    lacking.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(lacking.model.layers) if index != 2)
    for index, layer in enumerate(lacking.model.layers):
        layer.self_attn.layer_idx = index
    lacking.config.num_hidden_layers = 5
    expected = greedy(lacking, **BEAMS)
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2])) as handle:
        assert torch.equal(greedy(model, **BEAMS), expected)
    assert not handle.trace.ordered
    assert not handle.trace.response.executed[..., 2].any()


def test_skipped_without_a_cache(tiny: Any, greedy: Any) -> None:
    """The prompt's tokens and the response's share a forward, each under its phase's part of the one plan."""
    model = tiny("llama")
    plan = VoidPlan.from_layers(model, mlp=[2], phase="response")
    with void_ext.patch(model, mode="skip", plan=plan) as handle:
        expected = greedy(model, **BEAMS)
        assert torch.equal(greedy(model, use_cache=False, **BEAMS), expected)
        assert not handle.trace.ordered


def test_rows_that_differ_are_refused(tiny: Any, greedy: Any) -> None:
    model = tiny("llama")
    run, off = (Action.RUN,) * 6, (Action.RUN, Action.PROJECT) + (Action.RUN,) * 4
    rows = PhasePlan((run, off, run), (run,) * 3)
    for options in ({"plan": VoidPlan(rows, rows)}, {"policy": PromptPlan()}):
        with void_ext.patch(model, mode="skip", **options) as handle:
            with pytest.raises(ValueError, match="beam search moves rows"):
                greedy(model, **BEAMS)
            assert handle.trace is None
    with void_ext.patch(model, mode="skip", policy=PromptPlan(granularity="batch")):
        greedy(model, **BEAMS)


def test_a_cache_that_moves_within_one_generation(tiny: Any, greedy: Any) -> None:
    """As an offloaded one does: generate() without beams keeps its rows where they are."""
    model = tiny("llama")
    expected = greedy(model)
    cache = DynamicCache(config=model.config)

    def moves(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cache.layers[0].keys = cache.layers[0].keys.clone()
        return scores

    with void_ext.patch(model) as handle:
        assert torch.equal(greedy(model, past_key_values=cache, logits_processor=[moves]), expected)
    assert handle.trace.ordered


class Table(Policy):
    """Tells rows apart without having said that it would (``by_row``)."""

    def decide(self, history: History | None, phase: str) -> Any:
        if phase == "prompt" or history is None:
            return None
        table = torch.ones(history.rows, history.layers, dtype=torch.bool)
        table[0, 2] = False
        return table


@torch.no_grad()
def test_a_table_whose_rows_differ_is_refused(tiny: Any, greedy: Any, padded_batch: Any) -> None:
    """Before the forward that it was to govern, the second one of the response."""
    model, ids = tiny("llama"), padded_batch[0]
    with void_ext.patch(model, mode="skip", policy=Table()) as handle:
        with pytest.raises(ValueError, match="same for all rows from Table, which says by_row = False"):
            greedy(model, **BEAMS)
        assert handle.trace.response.positions == [9]
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        with pytest.raises(ValueError, match="same for all rows from Table, which says by_row = False"):
            model(ids[:, 1:2], past_key_values=cache)


@torch.no_grad()
def test_rows_moved_by_hand(tiny: Any, padded_batch: Any) -> None:
    """A loop of one's own with ``cache.reorder_cache``: what cannot be followed is said, or refused."""
    model = tiny("llama")
    ids = padded_batch[0]

    def steps(move: bool, crop: bool) -> list[torch.Tensor]:
        cache = model(ids, use_cache=True).past_key_values
        logits = [model(ids[:, :1], past_key_values=cache).logits]
        if crop:
            cache.crop(-1)
        if move:
            cache.reorder_cache(torch.tensor([2, 0, 0]))
        return [*logits, model(ids[:, 1:2], past_key_values=cache).logits]

    for move in (False, True):
        for crop in (False, True):
            expected = steps(move, crop)
            with void_ext.patch(model) as handle:
                assert all(map(torch.equal, steps(move, crop), expected))
                assert handle.trace.ordered is not move
                # It stays so when generate() goes on with that cache.
                cache = DynamicCache(config=model.config)
                model(ids, past_key_values=cache)
                if move:
                    cache.reorder_cache(torch.tensor([2, 0, 0]))
                for new in (1, 3):
                    model.generate(ids.repeat(1, 2)[:, : 9 + new], past_key_values=cache, max_new_tokens=2)
                    assert handle.trace.ordered is not move
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2])) as handle:
        steps(True, False)
        assert not handle.trace.ordered
    with void_ext.patch(model, mode="skip", policy=PromptPlan()) as handle:
        steps(False, True)
        with pytest.raises(ValueError, match=r"may have been moved .* PromptPlan decides for each row"):
            steps(True, False)
