"""Skipping on a GPU: the tokens of the oracle, and not one wait for the device in a decode step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext
from void_ext import Action, HaltPlan, PhasePlan, PromptPlan, RefreshPlan, VoidPlan, reference
from void_ext.testing import Tolerance, assert_close

pytestmark = pytest.mark.gpu

LAYERS = 6
NEAR = Tolerance(atol=2e-3, rtol=2e-3, reason="float32 products of other shapes, six layers deep, TF32 off")


def plans() -> dict[str, dict[str, Any]]:
    run, project, skip = Action.RUN, Action.PROJECT, Action.SKIP
    rows = [tuple(project if (layer + row) % 3 == 0 else run for layer in range(LAYERS)) for row in range(3)]
    mlps = [tuple(skip if action == project else run for action in row) for row in rows]
    return {
        "skip": {"plan": VoidPlan.from_layers(LAYERS, skip=[0, 3])},
        "halves": {"plan": VoidPlan.from_layers(LAYERS, attention=[2], mlp=[4], phase="response")},
        "by row": {"plan": VoidPlan(PhasePlan.dense(LAYERS), PhasePlan(tuple(rows), tuple(mlps)))},
        "prompt": {"policy": PromptPlan(budget=2)},
        "refresh": {"policy": RefreshPlan(3, budget=2)},
        "halt": {"policy": HaltPlan()},
    }


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", list(plans()))
def test_tokens_are_the_oracles(name: str, cache: str | None, cuda: torch.device, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama").to(cuda)
    ids, mask = (tensor.to(cuda) for tensor in padded_batch)
    with void_ext.patch(model, mode="skip", **plans()[name]) as handle:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, cache_implementation=cache
        )
        trace = handle.trace
    if name in ("halves",):
        return  # what the trace calls executed does not tell the halves apart
    executed = torch.cat([trace.prompt.executed, trace.response.executed], 1)
    whole = torch.cat([mask, torch.ones(3, 7, dtype=mask.dtype, device=cuda)], 1)
    positions = (whole.cumsum(-1) - 1).clamp_min(0)
    expected = reference.run_plan(model, out[:, :-1], executed, executed, mask=whole, positions=positions)
    logits = expected.logits[:, ids.shape[1] - 1 :]
    logits[..., model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens does
    assert torch.equal(out[:, ids.shape[1] :], logits.argmax(-1))
    norms = torch.stack([stream.double().norm(dim=-1).float() for stream in expected.streams], -1)
    assert_close(trace.response.norms, norms[:, ids.shape[1] :], NEAR, "norms")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", list(plans()))
@torch.no_grad()
def test_a_token_waits_for_nothing(name: str, kind: str, cuda: torch.device, tiny: Any, padded_batch: Any) -> None:
    """The steps after the first of the response, where a policy may read the prompt's verdicts back once."""
    from transformers import DynamicCache, StaticCache

    model = tiny("llama").to(cuda)
    ids = padded_batch[0].to(cuda)
    tokens = ids[:, -1:].contiguous()
    positions = [torch.full((3, 1), ids.shape[1] + step, device=cuda) for step in range(12)]

    def steps() -> None:
        if kind == "dynamic":
            cache = DynamicCache(config=model.config)
        else:
            cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 16)
        model(ids, past_key_values=cache)
        for step in range(4):  # libraries set themselves up
            model(tokens, past_key_values=cache, position_ids=positions[step])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(4, 10):
                model(tokens, past_key_values=cache, position_ids=positions[step])
        finally:
            torch.cuda.set_sync_debug_mode("default")

    try:
        steps()
    except RuntimeError as error:
        pytest.skip(f"the unpatched model waits for the device: {error}")
    with void_ext.patch(model, mode="skip", **plans()[name]):
        steps()
