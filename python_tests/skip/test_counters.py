"""What the counters say was launched, against hooks on the linears, which know nothing of plans."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import void_ext
from python_tests.generation import end_others
from void_ext.plan import Action, PhasePlan, VoidPlan

LAYERS = 6
RUN, PROJECT, SKIP = Action.RUN, Action.PROJECT, Action.SKIP


class Census:
    """Calls of every linear and norm, per phase by the number of tokens in the call."""

    def __init__(self, model: Any):
        self.calls: Counter[tuple[int, str]] = Counter()
        self.rows: Counter[str] = Counter()
        for index, layer in enumerate(model.model.layers):
            for name, module in layer.named_modules():
                if not list(module.children()) and list(module.parameters()):
                    module.register_forward_hook(self._hook(index, name.split(".")[-1]))

    def _hook(self, index: int, name: str) -> Any:
        def count(module: Any, args: Any, output: torch.Tensor) -> None:
            self.calls[index, name] += 1
            self.rows[name] += args[0].shape[:-1].numel()

        return count


def plan() -> VoidPlan:
    prompt = PhasePlan((RUN, PROJECT, SKIP, RUN, PROJECT, RUN), (RUN, SKIP, SKIP, SKIP, RUN, RUN))
    response = PhasePlan((RUN, RUN, SKIP, RUN, PROJECT, SKIP), (RUN, RUN, SKIP, RUN, SKIP, SKIP))
    return VoidPlan(prompt=prompt, response=response, fingerprint=None, source="test")


@pytest.mark.parametrize("cache", [None, "static"])
def test_counters_agree_with_the_linears(cache: str | None, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    with void_ext.patch(model, mode="skip", plan=plan()) as handle:
        census = Census(model)
        model.generate(
            ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation=cache
        )
    prompt, response = handle.counters.prompt, handle.counters.response
    assert (prompt.calls, response.calls) == (1, 3)
    total = handle.counters.total
    by_name: Counter[str] = Counter()
    for (_, name), calls in census.calls.items():
        by_name[name] += calls
    assert by_name["q_proj"] == by_name["o_proj"] == total.attention_run
    assert by_name["k_proj"] == by_name["v_proj"] == total.attention_run + total.attention_projected
    assert by_name["input_layernorm"] == by_name["k_proj"]
    assert by_name["gate_proj"] == by_name["down_proj"] == by_name["post_attention_layernorm"] == total.mlp_run
    assert (total.attention_run, total.attention_projected, total.attention_skipped) == (3 + 9, 2 + 3, 1 + 6)
    assert (total.mlp_run, total.mlp_skipped) == (3 + 9, 3 + 9)
    assert (prompt.layers_run, prompt.layers_projected, prompt.layers_skipped) == (4, 1, 1)
    assert census.rows["k_proj"] + census.rows["gate_proj"] == total.rows_computed == total.rows_needed
    # A layer that is skipped is not touched at all.
    assert not any(index == 2 for index, _ in census.calls)


def test_weight_bytes_are_those_of_what_ran(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, _ = padded_batch
    layer = model.model.layers[0]

    def size(*modules: Any) -> int:
        return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())

    with void_ext.patch(model, mode="skip", plan=plan()) as handle, torch.no_grad():
        model(ids)
    attention = size(layer.self_attn, layer.input_layernorm)
    projection = size(layer.self_attn.k_proj, layer.self_attn.v_proj, layer.input_layernorm)
    mlp = size(layer.mlp, layer.post_attention_layernorm)
    assert handle.counters.prompt.weight_bytes == 3 * attention + 2 * projection + 3 * mlp
    handle.counters.reset()
    assert handle.counters.total.calls == 0


def test_rows_that_differ(tiny: Any) -> None:
    model = tiny("llama")
    ids = torch.randint(3, 96, (3, 5))
    rows = [(RUN,) * LAYERS, (PROJECT,) + (RUN,) * (LAYERS - 1), (PROJECT,) + (RUN,) * (LAYERS - 1)]
    mlps = [(RUN,) * LAYERS, (SKIP,) + (RUN,) * (LAYERS - 1), (SKIP,) + (RUN,) * (LAYERS - 1)]
    phase = PhasePlan(tuple(rows), tuple(mlps))
    mixed = VoidPlan(prompt=phase, response=phase, fingerprint=None, source="test")
    with void_ext.patch(model, mode="skip", plan=mixed) as handle, torch.no_grad():
        census = Census(model)
        model(ids)
    prompt = handle.counters.prompt
    assert prompt.rows_needed == 2 * LAYERS * 15 - 2 * 10
    assert prompt.rows_computed == census.rows["k_proj"] + census.rows["gate_proj"]
    assert prompt.rows_needed <= prompt.rows_computed <= 2 * LAYERS * 15


def test_rows_that_ended_want_nothing(tiny: Any, padded_batch: Any) -> None:
    """Once only a row that goes without layer 3 is left, layer 3 is not launched."""
    model = tiny("llama")
    ids, mask = padded_batch
    without = (RUN, RUN, RUN, PROJECT, RUN, RUN)
    off = (RUN, RUN, RUN, SKIP, RUN, RUN)
    every = (RUN,) * LAYERS
    mixed = VoidPlan(PhasePlan.dense(LAYERS), PhasePlan((without, every, every), (off, every, every)))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with void_ext.patch(model, mode="skip", plan=mixed) as handle:
        expected = model.generate(ids, attention_mask=mask, **settings)
        handle.counters.reset()
        census = Census(model)
        out = model.generate(ids, attention_mask=mask, stopping_criteria=end_others(9 + 2), **settings)
    steps = handle.counters.response.calls
    assert steps == 7
    assert torch.equal(out[0], expected[0])
    assert (out[1:, -3:] == 0).all()
    # The prompt, two steps before the rows are known to have ended, one while the host is told.
    assert census.calls[3, "q_proj"] == census.calls[3, "gate_proj"] == 1 + 2
    assert census.calls[3, "k_proj"] == census.calls[2, "q_proj"] == 1 + steps
    needed = handle.counters.response.rows_needed
    assert needed < handle.counters.response.rows_computed


def test_no_counters_where_nothing_is_skipped(tiny: Any) -> None:
    with void_ext.patch(tiny("llama")) as handle:
        assert handle.counters is None
        assert handle.plan is None
