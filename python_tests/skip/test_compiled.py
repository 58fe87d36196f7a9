"""Skipping under ``torch.compile``: what is not launched is not in the graph; one graph a schedule, none a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.generation import CompileConfig

import void_ext
from python_tests.compiling import UNGROUPED, decode, graphs
from void_ext import VoidPlan
from void_ext.patching.ledger import CacheHoleError
from void_ext.plan import Action, PhasePlan
from void_ext.testing.compare import assert_bits_equal

LAYERS = 4
pytestmark = pytest.mark.usefixtures("nothing_compiled")


def matrix_products() -> tuple[list[int], Any]:
    """A backend that notes the matrix products of each graph, and the list."""
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(sum(node.target is torch.nn.functional.linear for node in _nodes(graph)))
        return graph.forward

    return found, backend


def _nodes(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("fuse", ["add", "norm"])
@pytest.mark.parametrize("phase", ["both", "prompt"])
@torch.no_grad()
def test_as_eager_and_compiled_once(phase: str, fuse: str, tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS, **UNGROUPED)
    ids = torch.randint(3, 96, (2, 9))
    plan = VoidPlan.from_layers(model, skip=[1], attention=[2], mlp=[3], phase=phase)
    with void_ext.patch(model, mode="skip", plan=plan, fuse=fuse) as handle:
        expected = decode(model, model, ids)
        eager, counters = handle.trace, handle.counters.response
    with void_ext.patch(model, mode="skip", plan=plan, fuse=fuse) as handle:
        products, backend = matrix_products()
        forward = torch.compile(model, fullgraph=True, backend=backend)
        actual = decode(forward, model, ids)
        trace = handle.trace
        assert handle.counters.response == counters
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_bits_equal(decode(forward, model, ids), expected)
    assert_bits_equal(actual, expected)
    assert_bits_equal(trace.response.norms, eager.response.norms)
    assert torch.equal(trace.response.executed, eager.response.executed)
    # Four products an attention, three an MLP, and the head; a response after a plan for the prompt runs everything.
    whole = LAYERS * 7 + 1
    assert products == [whole - 7 - 4 - 3 if phase == "both" else whole]


@torch.no_grad()
def test_keys_and_values_alone(tiny: Any) -> None:
    # With sdpa transformers before 5.18 masks a compiled prefill where an eager one has is_causal, patched or not.
    model = tiny("llama", layers=LAYERS, attention="eager")
    ids = torch.randint(3, 96, (2, 9))
    plan = VoidPlan.from_layers(model, skip=[1], phase="prompt")
    with void_ext.patch(model, mode="skip", plan=plan) as handle:
        caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
        expected, eager = model(input_ids=ids, past_key_values=caches[0]).logits, handle.trace
        products, backend = matrix_products()
        forward = torch.compile(model, fullgraph=True, backend=backend)
        assert_bits_equal(forward(input_ids=ids, past_key_values=caches[1]).logits, expected)
        for layer in range(LAYERS):
            assert_bits_equal(caches[1].layers[layer].keys, caches[0].layers[layer].keys)
        assert_bits_equal(handle.trace.prompt.norms, eager.prompt.norms)
    assert products == [LAYERS * 7 + 1 - 5]


@torch.no_grad()
def test_a_hole_is_refused_before_any_compute(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (1, 9))
    cache = StaticCache(config=model.config, max_cache_len=32)
    plan = VoidPlan.from_layers(model, skip=[1])
    forward = torch.compile(model, fullgraph=True, backend="eager")
    with void_ext.patch(model, mode="skip", plan=plan):
        forward(input_ids=ids, past_key_values=cache)
    with void_ext.patch(model):
        before = graphs()
        with pytest.raises(CacheHoleError, match="layer 1 holds 0 of its 9 positions"):
            forward(input_ids=ids[:, :1], past_key_values=cache)
        assert graphs() == before


def test_one_graph_a_decision(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    prompts = [torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def run(ids: Tensor, **more: Any) -> Tensor:
        return model.generate(
            input_ids=ids, max_new_tokens=5, do_sample=False, cache_implementation="static", use_cache=True, **more
        )

    policy = void_ext.PromptPlan(protect_default=False)
    with void_ext.patch(model, mode="skip", policy=policy) as handle:
        plans = set()
        for ids in prompts:
            expected = run(ids)
            assert torch.equal(run(ids, compile_config=config), expected)
            plans.add(handle.plan.response)
        assert graphs() == len(plans) > 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            for ids in prompts:
                run(ids, compile_config=config)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (void_ext.HaltPlan(), "HaltPlan decides inside of a call"),
        (void_ext.RefreshPlan(every=3), "RefreshPlan decides for every token"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled(policy: Any, reason: str, tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (1, 9))
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    with void_ext.patch(model, mode="skip", policy=policy) as handle:
        with torch.no_grad(), pytest.raises(ValueError, match=f"policy: {reason}.*use StaticPlan or PromptPlan"):
            torch.compile(model, backend="eager")(input_ids=ids)
        assert handle.trace is None
        settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
        expected = model.generate(input_ids=ids, **settings)
        with pytest.warns(UserWarning, match=f"does not compile its forward here: {reason}"):
            assert torch.equal(model.generate(input_ids=ids, compile_config=config, **settings), expected)
        assert f"compile   no: {reason}" in handle.describe()
    assert graphs() == 0


def test_generate_does_not_compile_where_rows_may_differ(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    with void_ext.patch(model, mode="skip", policy=void_ext.PromptPlan(protect_default=False)) as handle:
        for given in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids).detach()}):
            expected = model.generate(**given, **settings)
            assert handle.plan.response.rows == 2
            with pytest.warns(UserWarning, match="PromptPlan may decide otherwise for each row"):
                assert torch.equal(model.generate(**given, compile_config=config, **settings), expected)
    assert graphs() == 0


@torch.no_grad()
def test_rows_that_differ_cannot_be_compiled(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (2, 9))
    dense = (Action.RUN,) * LAYERS
    rows = VoidPlan(PhasePlan.dense(LAYERS), PhasePlan((dense, dense), ((Action.SKIP, *dense[1:]), dense)))
    with void_ext.patch(model, mode="skip", plan=rows) as handle:
        with pytest.raises(ValueError, match=r"plan: its rows.*differ.*or run the model without torch\.compile"):
            decode(torch.compile(model, backend="eager"), model, ids)
        assert handle.trace.response.norms.shape[1] == 0
        decode(model, model, ids)
    assert graphs() == 0
