"""Caches filled under a plan: lengths stay right, holes are refused, and nothing is left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import void_ext
from void_ext.patching.ledger import _CROPS_TO, CacheGuard, CacheHoleError, SkippedSlot
from void_ext.plan import VoidPlan

LAYERS = 6


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(5))


def cache_of(kind: str, model: Any) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=24)


def contents(cache: Any) -> list[Any]:
    return [
        None if slot.keys is None else (slot.keys.clone(), slot.values.clone(), int(slot.get_seq_length()))
        for slot in cache.layers
    ]


def same(before: list[Any], after: list[Any]) -> bool:
    return all(
        (a is None and b is None) or (torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2])
        for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("skip", [[0], [0, 1], [3], [5]])
@torch.no_grad()
def test_lengths_are_those_of_the_whole_cache(kind: str, skip: list[int], tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    cache = cache_of(kind, model)
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=skip)):
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    for layer in range(LAYERS):
        assert int(cache.get_seq_length(layer)) == 9
        assert isinstance(cache.layers[layer], SkippedSlot) == (layer in skip)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_the_dense_model_is_refused_before_it_writes(kind: str, tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    cache = cache_of(kind, model)
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2, 4])):
        model(ids, past_key_values=cache)
    before = contents(cache)
    with pytest.raises(CacheHoleError, match=r"layers were skipped \(2, 4\): layer 2 holds 0 of its 8 positions"):
        model(ids[:, :1], past_key_values=cache)
    assert same(before, contents(cache))
    with void_ext.patch(model), pytest.raises(CacheHoleError, match="layer 2 holds 0"):
        model(ids[:, :1], past_key_values=cache)
    assert same(before, contents(cache))
    # Another plan that runs less goes on; one that runs more does not.
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[1, 2, 4], phase="both")):
        model(ids[:, :1], past_key_values=cache)
    with (
        void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2])),
        pytest.raises(CacheHoleError, match=r"\(1, 4\): layer 1 holds 8 of its 9"),
    ):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("back", [2, 4])
@torch.no_grad()
def test_a_response_plan_leaves_a_hole_behind_the_prompt(back: int, tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    plan = VoidPlan.from_layers(model, skip=[1, 3], phase="response")
    with void_ext.patch(model, mode="skip", plan=plan):
        model(ids, past_key_values=cache)
        assert not any(isinstance(slot, SkippedSlot) for slot in cache.layers)
        model(ids[:, :1], past_key_values=cache)
        model(ids[:, 1:2], past_key_values=cache)
        assert cache.layers[1].held == 8
        assert cache.layers[1].keys.shape[-2] == 8
        with pytest.raises(CacheHoleError, match="layer 1 holds 8 of its 10 positions"):
            model(ids, past_key_values=cache)  # a second prompt runs every layer
        # Taken back to where every layer holds all of it, or further, the cache is whole again.
        if not _CROPS_TO:
            cache.crop(0)
            assert cache.layers[1].keys.shape[-2] == 8
        cache.crop(-back)
        again = model(ids, past_key_values=cache).logits
    assert not any(isinstance(slot, SkippedSlot) for slot in cache.layers)
    assert "update" not in vars(cache)
    kept = 10 - back
    expected = model(torch.cat([ids[:, :kept], ids], 1)).logits[:, kept:]
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_projected_layers_may_come_back(tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    plan = VoidPlan.from_layers(model, attention=[0, 2], phase="prompt")
    with void_ext.patch(model, mode="skip", plan=plan) as handle:
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert handle.counters.prompt.attention_projected == 2
    assert handle.counters.response.attention_run == LAYERS
    model(ids[:, :1], past_key_values=cache)  # and the dense model goes on with it
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_reset_makes_a_cache_whole(kind: str, tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    cache = cache_of(kind, model)
    fresh = cache_of(kind, model)
    expected = model(ids, past_key_values=fresh).logits
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[0, 3])):
        model(ids, past_key_values=cache)
    cache.reset()
    if kind == "dynamic" and cache.get_seq_length():  # transformers 4.57 keeps the length, and so the holes
        with pytest.raises(CacheHoleError):
            model(ids, past_key_values=cache)
        return
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)
    assert "update" not in vars(cache)
    assert not any(isinstance(slot, SkippedSlot) for slot in cache.layers)


@torch.no_grad()
def test_copies_and_row_operations_keep_the_ledger(tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    plan = VoidPlan.from_layers(model, skip=[0, 3])
    with void_ext.patch(model, mode="skip", plan=plan):
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        expected = model(ids[:, :1], past_key_values=cache).logits
        assert twin.get_seq_length() == 8
        assert torch.equal(model(ids[:, :1], past_key_values=twin).logits, expected)
        assert isinstance(vars(twin)["update"], CacheGuard)
        twin.crop(-1)
        assert twin.get_seq_length() == 8
        assert twin.get_seq_length(3) == 8
        twin.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(model(ids[[1, 0], :1], past_key_values=twin).logits, expected[[1, 0]])
        twin.batch_repeat_interleave(2)
        assert model(ids[[1, 1, 0, 0], :1], past_key_values=twin).logits.shape[0] == 4
    with pytest.raises(CacheHoleError):
        model(ids[[1, 1, 0, 0], :1], past_key_values=twin)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("start", [0, 8])
@torch.no_grad()
def test_a_failed_forward_takes_back_what_it_wrote(kind: str, start: int, tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")
    plan = VoidPlan.from_layers(model, skip=[1])
    cache, reference = cache_of(kind, model), cache_of(kind, model)
    with void_ext.patch(model, mode="skip", plan=plan):
        if start:
            model(ids, past_key_values=cache)
            model(ids, past_key_values=reference)
        failing = model.model.layers[3].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :2], past_key_values=cache)
        failing.remove()
        assert int(cache.get_seq_length()) == start
        # An empty one takes a batch of another size; a static one has got its size.
        rows = slice(1) if kind == "dynamic" and start == 0 else slice(None)
        expected = model(ids[rows, :2], past_key_values=reference).logits
        assert torch.equal(model(ids[rows, :2], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_what_cannot_be_taken_back_is_unusable(tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("mistral")
    model.config.sliding_window = 4
    cache = DynamicCache(config=model.config)
    with void_ext.patch(model, mode="skip", plan=VoidPlan.dense(LAYERS)):
        model(ids, past_key_values=cache)
        failing = model.model.layers[3].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :2], past_key_values=cache)
        failing.remove()
        with pytest.raises(CacheHoleError, match="a forward failed"):
            model(ids[:, :2], past_key_values=cache)
    with pytest.raises(CacheHoleError, match="a forward failed"):
        model(ids[:, :2], past_key_values=cache)


@torch.no_grad()
def test_unknown_caches_are_refused_by_name(tiny: Any, ids: torch.Tensor) -> None:
    model = tiny("llama")

    class Odd(DynamicCache):
        pass

    class OddLayer(type(DynamicCache(config=model.config).layers[0])):  # type: ignore[misc]
        pass

    odd = Odd(config=model.config)
    odd.layers[2] = OddLayer()
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[1])):
        with pytest.raises(TypeError, match="layer 2 is a OddLayer"):
            model(ids, past_key_values=odd)
        assert odd.get_seq_length() == 0


@torch.no_grad()
def test_a_cache_is_freed_without_the_garbage_collector(tiny: Any, ids: torch.Tensor) -> None:
    import gc
    import weakref

    model = tiny("llama")
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[1])):
        cache = model(ids, use_cache=True).past_key_values
        alive = weakref.ref(cache)
        gc.disable()
        try:
            del cache
            assert alive() is None
        finally:
            gc.enable()


@torch.no_grad()
def test_a_cache_that_could_not_have_holes_is_refused_before_the_prompt(tiny: Any, ids: torch.Tensor) -> None:
    """The prompt runs dense and would leave none: but what comes after it is not for that cache."""
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with (
        void_ext.patch(model, mode="skip", policy=void_ext.PromptPlan()),
        pytest.raises(TypeError, match="an offloaded cache cannot be used with mode='skip'"),
    ):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
