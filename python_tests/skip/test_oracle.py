"""Skipping launches less and gives what the slow interpreter of plans gives: logits, caches, traces, counters."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import void_ext
from void_ext import reference
from void_ext.patching.ledger import SkippedSlot
from void_ext.plan import Action, PhasePlan, VoidPlan
from void_ext.testing import assert_bits_equal, assert_close, tolerance

LAYERS = 6
PROMPT, RESPONSE = 7, 5
NEAR = tolerance("oracle", torch.float32)
RUN, PROJECT, SKIP = Action.RUN, Action.PROJECT, Action.SKIP


def random_row(rng: random.Random) -> tuple[list[list[Action]], list[list[Action]]]:
    """Actions of attention and MLP, each ``[phase][layer]``, that leave no hole."""
    attention: list[list[Action]] = [[], []]
    mlp: list[list[Action]] = [[], []]
    for _ in range(LAYERS):
        first = rng.choice([RUN, RUN, PROJECT, SKIP])
        attention[0].append(first)
        attention[1].append(SKIP if first == SKIP else rng.choice([RUN, RUN, PROJECT, SKIP]))
        for phase in mlp:
            phase.append(rng.choice([RUN, RUN, SKIP]))
    return attention, mlp


def random_plan(seed: int, rows: int | None) -> VoidPlan:
    rng = random.Random(seed)
    if rows is None:
        attention, mlp = random_row(rng)
        phases = [PhasePlan(tuple(a), tuple(m)) for a, m in zip(attention, mlp, strict=True)]
    else:
        made = [random_row(rng) for _ in range(rows)]
        phases = [PhasePlan(*(tuple(tuple(row[half][p]) for row in made) for half in (0, 1))) for p in (0, 1)]
    return VoidPlan(prompt=phases[0], response=phases[1], fingerprint=None, source="random")


def tables(plan: VoidPlan, batch: int, phases: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token runs which half, ``[B, T, L]``, in the slowest way."""
    found = torch.zeros(2, batch, len(phases), LAYERS, dtype=torch.bool)
    for t, name in enumerate(phases):
        phase = plan.phase(name)
        for b in range(batch):
            for half, actions in enumerate((phase.attention, phase.mlp)):
                row = actions[b] if phase.rows is not None else actions
                for layer in range(LAYERS):
                    found[half, b, t, layer] = row[layer] == RUN
    return found[0], found[1]


def new_cache(kind: str, model: Any) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "lazy":
        return DynamicCache()
    return StaticCache(config=model.config, max_cache_len=PROMPT + RESPONSE + 3)


def walk(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
    """The prompt in two pieces, then token by token."""
    logits = []
    steps = [(0, 4), (4, PROMPT)] + [(t, t + 1) for t in range(PROMPT, PROMPT + RESPONSE)]
    for start, end in steps:
        with torch.no_grad():
            out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def build(tiny: Any, family: str, **options: Any) -> Any:
    model = tiny(family.removesuffix("-sliding"), scaled_norms=True, **options)
    if family.endswith("-sliding"):
        model.config.sliding_window = 4
    return model


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 96, (3, PROMPT + RESPONSE), generator=generator), torch.ones(3, PROMPT + RESPONSE).long()


@pytest.mark.usefixtures("ways_of_taking_norms")
@pytest.mark.parametrize("by_row", [False, True], ids=["uniform", "by-row"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("cache", ["dynamic", "lazy", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "mistral-sliding", "qwen2"])
def test_the_fast_path_is_the_oracle(
    family: str, cache: str, padded: bool, by_row: bool, tiny: Any, batch: Any
) -> None:
    if family == "mistral-sliding" and cache == "lazy":
        pytest.skip("a cache made without a configuration knows no window")
    model = build(tiny, family)
    ids, mask = batch
    if padded:
        mask[1, :3] = mask[2, :1] = 0
    phases = ["prompt"] * PROMPT + ["response"] * RESPONSE
    real = mask.bool()
    for seed in range(4):
        plan = random_plan(seed, 3 if by_row else None)
        attention, mlp = tables(plan, 3, phases)
        with torch.no_grad():
            expected = reference.run_plan(model, ids, attention, mlp, mask=mask)
        kept = new_cache(cache, model)
        with void_ext.patch(model, mode="skip", plan=plan) as handle:
            logits = walk(model, ids, mask, kept)
        assert_close(logits[real], expected.logits[real], NEAR, f"logits, seed {seed}")
        check_cache(kept, expected, real, family)
        check_trace(handle, expected, attention | mlp, real)


def check_cache(cache: Any, expected: reference.PlanResult, real: torch.Tensor, family: str) -> None:
    assert cache.get_seq_length() == PROMPT + RESPONSE
    for layer, slot in enumerate(cache.layers):
        held = slot.held if isinstance(slot, SkippedSlot) else PROMPT + RESPONSE
        if not held:
            continue
        window = 3 if family.endswith("sliding") else held
        for name, wanted in (("keys", expected.keys[layer]), ("values", expected.values[layer])):
            found = getattr(slot, name)
            found = found[:, :, -window:] if family.endswith("sliding") else found[:, :, :held]
            wanted = wanted[:, :, :held][:, :, -window:]
            rows = real[:, :held][:, -window:]
            assert_close(found.transpose(1, 2)[rows], wanted.transpose(1, 2)[rows], NEAR, f"{name} of layer {layer}")


def check_trace(handle: Any, expected: reference.PlanResult, executed: torch.Tensor, real: torch.Tensor) -> None:
    norms = torch.stack([stream.double().norm(dim=-1).float() for stream in expected.streams], -1)
    for part, span in ((handle.trace.prompt, slice(0, PROMPT)), (handle.trace.response, slice(PROMPT, None))):
        assert torch.equal(part.executed, executed[:, span])
        assert_close(part.norms[real[:, span]], norms[:, span][real[:, span]], NEAR, "norms")
        assert not (part.active(0.0) & ~part.executed).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_the_same_products_give_the_same_bits(family: str, dtype: torch.dtype, tiny: Any, batch: Any) -> None:
    model = tiny(family, dtype=dtype, attention="eager")
    ids, mask = batch
    for seed in range(6):
        plan = random_plan(seed, None)
        attention, mlp = tables(plan, 3, ["prompt"] * ids.shape[1])
        with torch.no_grad():
            expected = reference.run_plan(model, ids, attention, mlp, mask=mask)
            with void_ext.patch(model, mode="skip", plan=plan):
                assert_bits_equal(model(ids, use_cache=False).logits, expected.logits)
                assert_bits_equal(model(ids, use_cache=True).logits, expected.logits)


@pytest.mark.parametrize("by_row", [False, True], ids=["uniform", "by-row"])
def test_without_a_cache_each_position_keeps_its_phase(by_row: bool, tiny: Any, batch: Any) -> None:
    model = tiny("llama")
    ids, _ = batch
    prompt = ids[:, :PROMPT]
    for seed in range(4):
        plan = random_plan(seed, 3 if by_row else None)
        with void_ext.patch(model, mode="skip", plan=plan) as handle:
            settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
            uncached = model.generate(prompt, use_cache=False, **settings)
            cached = model.generate(prompt, **settings)
            trace = handle.trace
        attention, mlp = tables(plan, 3, ["prompt"] * PROMPT + ["response"] * 4)
        expected = reference.run_plan(model, cached[:, :-1], attention, mlp).logits[:, PROMPT - 1 :]
        expected[..., model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens does
        assert torch.equal(cached[:, PROMPT:], expected.argmax(-1))
        assert torch.equal(uncached, cached)
        assert trace.response.executed.shape == (3, 4, LAYERS)


@pytest.mark.parametrize("fuse", ["add", "norm"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_an_empty_plan_is_the_model(family: str, fuse: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny(family)
    ids, mask = padded_batch
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(ids, **settings)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    with void_ext.patch(model, fuse=fuse) as handle:
        model.generate(ids, **settings)
        traced = handle.trace
    with void_ext.patch(model, mode="skip", plan=VoidPlan.dense(LAYERS), fuse=fuse) as handle:
        assert torch.equal(model.generate(ids, **settings), plain)
        for name in ("prompt", "response"):
            assert_bits_equal(getattr(handle.trace, name).norms, getattr(traced, name).norms)
        with torch.no_grad():
            found = model(ids, attention_mask=mask).logits
        if fuse == "add":
            assert_bits_equal(found, logits)
        else:
            assert_close(found, logits, NEAR)


@pytest.mark.parametrize("cache", [None, "static"])
def test_all_skipped_keeps_the_embedding(cache: str | None, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    plan = VoidPlan.from_layers(model, skip=range(LAYERS))
    with void_ext.patch(model, mode="skip", plan=plan) as handle:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, cache_implementation=cache
        )
    trace = handle.trace
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(model.model.embed_tokens(out)))
    logits[..., model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens does
    assert torch.equal(out[:, 9:], logits[:, 8:-1].argmax(-1))
    norms = trace.response.norms
    assert torch.equal(norms, norms[..., :1].expand_as(norms))
    assert not trace.prompt.executed.any()
    assert handle.counters.total.weight_bytes == 0


@pytest.mark.parametrize("fuse", ["add", "norm"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_it_is_the_model_that_lacks_the_layers(fuse: str, cache: str | None, tiny: Any, padded_batch: Any) -> None:
    ids, mask = padded_batch
    model = tiny("qwen2")
    for skip in ([0], [2, 3], [5], [0, 1, 4, 5]):
        small = tiny("qwen2")
        small.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(small.model.layers) if i not in skip)
        for index, layer in enumerate(small.model.layers):
            layer.self_attn.layer_idx = index
        small.config.num_hidden_layers = LAYERS - len(skip)
        small.config.layer_types = small.config.layer_types[: LAYERS - len(skip)]
        settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
        expected = small.generate(ids, **settings)
        with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=skip), fuse=fuse):
            assert torch.equal(model.generate(ids, **settings), expected)
