"""What a critical reader found: interrupted calls, ends that are none, assisted decoding, calls nobody announced."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import void_ext
from python_tests.generation import end_others
from void_ext import reference
from void_ext.patching.ledger import CacheHoleError, SkippedSlot
from void_ext.plan import Action, PhasePlan, VoidPlan
from void_ext.policies import HaltPlan, History, Policy, PromptPlan, RefreshPlan
from void_ext.testing import assert_close, tolerance

LAYERS = 6
RUN, PROJECT, SKIP = Action.RUN, Action.PROJECT, Action.SKIP
NEAR = tolerance("oracle", torch.float32)


@torch.no_grad()
def test_rows_that_ended_in_generate_go_on_in_a_plain_call(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    rows = [tuple(PROJECT if (layer + row) % 3 == 0 else RUN for layer in range(LAYERS)) for row in range(3)]
    mlps = [tuple(SKIP if action == PROJECT else RUN for action in row) for row in rows]
    plan = VoidPlan(PhasePlan.dense(LAYERS), PhasePlan(tuple(rows), tuple(mlps)))
    cache = DynamicCache(config=model.config)
    with void_ext.patch(model, mode="skip", plan=plan) as handle:
        criteria = end_others(9 + 2)
        model.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=0, past_key_values=cache, stopping_criteria=criteria
        )
        model(ids[:, :1], past_key_values=cache)
        expected = torch.tensor([[action == RUN for action in row] for row in rows])
        assert torch.equal(handle.trace.response.executed[:, -1], expected)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_interrupt_leaves_a_model_that_unpatches(kind: str, inference: bool, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    )

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def session() -> None:
        mode = torch.inference_mode() if inference else torch.no_grad()
        with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(6, skip=[1])), mode:
            model(ids, past_key_values=cache)
            model.model.layers[3].mlp.register_forward_hook(interrupt)
            model(ids[:, :1], past_key_values=cache)

    with pytest.raises(KeyboardInterrupt):
        session()
    model.model.layers[3].mlp._forward_hooks.clear()
    assert "forward" not in vars(model.model.layers[0])
    assert int(cache.get_seq_length()) == 9
    with pytest.raises(CacheHoleError):
        model(ids[:, :1], past_key_values=cache)


@torch.inference_mode()
def test_a_reset_is_noticed_in_inference_mode_too(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    cache = StaticCache(config=model.config, max_cache_len=32)
    plan = VoidPlan.from_layers(model, skip=[1, 2], phase="response")
    with void_ext.patch(model, mode="skip", plan=plan) as handle:
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        if type(cache.layers[0]).reset is not type(cache.layers[1]).reset:
            assert isinstance(cache.layers[1], SkippedSlot)
        cache.reset()
        model(ids[:, :1], past_key_values=cache)  # a prompt of one token, all layers run
        assert handle.trace.prompt.executed.shape[1] == 1
        assert handle.trace.prompt.executed.all()


@torch.no_grad()
def test_a_crop_that_fails_heals_nothing(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    cache = DynamicCache(config=model.config)
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[0], phase="response")):
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    cache.layers[1].crop = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cache.crop(-5)
    del cache.layers[1].crop
    with pytest.raises(CacheHoleError):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("fuse", ["add", "norm"])
@torch.no_grad()
def test_norms_between_the_halves(fuse: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    attention = (RUN, SKIP, SKIP, RUN, PROJECT, RUN)
    mlp = (RUN, SKIP, RUN, SKIP, SKIP, RUN)
    phase = PhasePlan(attention, mlp)
    with void_ext.patch(model, mode="skip", plan=VoidPlan(phase, phase), halves=True, fuse=fuse) as handle:
        model(ids)
        trace = handle.trace.prompt
    for layer in range(LAYERS):
        if attention[layer] != RUN:
            assert_close(trace.halves[..., layer], trace.norms[..., layer], NEAR, f"layer {layer}")
        elif mlp[layer] == SKIP:
            assert_close(trace.halves[..., layer], trace.norms[..., layer + 1], NEAR, f"layer {layer}")
        else:
            assert (trace.halves[0, :, layer] > 0).all()


def test_policies_work_with_prompt_lookup(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1].repeat(1, 2)
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    policy = PromptPlan(budget=2, at_least=2)
    with void_ext.patch(model, mode="skip", policy=policy) as handle:
        expected = model.generate(ids, **settings)
        handle.counters.reset()
        handle.reset()
        found = model.generate(ids, prompt_lookup_num_tokens=3, **settings)
        assert handle.counters.response.attention_projected > 0
    # Candidates in the first call were run by all layers; tokens after it are as without them, unless they are its.
    assert torch.equal(found[:, : ids.shape[1] + 1], expected[:, : ids.shape[1] + 1])
    with void_ext.patch(model, mode="skip", policy=RefreshPlan(3, budget=2, at_least=2)) as handle:
        model.generate(ids, prompt_lookup_num_tokens=3, **settings)
        assert handle.counters.response.attention_projected > 0


class Failing(Policy):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def decide(self, history: History | None, phase: str) -> VoidPlan | None:
        if history is None:
            return None
        self.seen.append(len(history.phases))
        if len(self.seen) == 1:
            raise OSError("the file of plans is busy")
        return VoidPlan.from_layers(history.layers, mlp=[2], phase="response")


@torch.no_grad()
def test_a_policy_that_failed_is_asked_again_and_sees_what_the_cache_holds(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    policy = Failing()
    with void_ext.patch(model, mode="skip", policy=policy) as handle:
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(OSError, match="busy"):
            model(ids[:, :1], past_key_values=cache)
        cache.crop(-2)
        model(ids[:, :1], past_key_values=cache)
        assert policy.seen == [9, 7]
        assert handle.counters.response.mlp_skipped == 1


def test_bounds_that_fit_no_model_are_refused_at_once(tiny: Any) -> None:
    model = tiny("llama")
    for policy in (
        PromptPlan(protect=[99]),
        RefreshPlan(4, protect=[7]),
        HaltPlan(protect=[99]),
        PromptPlan(at_least=5),
    ):
        with pytest.raises(ValueError, match=r"protect|at_least"):
            void_ext.patch(model, mode="skip", policy=policy)
        assert "forward" not in vars(model.model.layers[0])


def test_tables_for_every_token_are_followed(tiny: Any, padded_batch: Any) -> None:
    class Tables(Policy):
        every_token = True

        def decide(self, history: History | None, phase: str) -> torch.Tensor | None:
            if history is None or phase == "prompt":
                return None
            run = torch.ones(history.rows, history.layers, dtype=torch.bool)
            run[:, 2 + len(history.phases) % 2] = False
            return run

    model = tiny("llama")
    ids, mask = padded_batch
    with void_ext.patch(model, mode="skip", policy=Tables()) as handle:
        model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        executed = handle.trace.response.executed[0]
    assert executed[0].all()
    for token in range(1, 5):
        assert [layer for layer in range(LAYERS) if not executed[token, layer]] == [2 + (9 + token - 1) % 2]


def test_guidance_runs_the_plan_too(tiny: Any, padded_batch: Any) -> None:
    """generate() runs the model once more by itself there; half a dense model would be neither one nor the other."""
    model = tiny("llama")
    ids = padded_batch[0][:1]
    calls: list[int] = []
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2])):
        model.model.layers[2].mlp.register_forward_hook(lambda *_: calls.append(1))
        model.generate(ids, guidance_scale=2.0, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert not calls


@torch.no_grad()
def test_projections_without_a_cache_are_not_made(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    calls: list[int] = []
    model.model.layers[2].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    plan = VoidPlan.from_layers(model, skip=[2], phase="prompt")
    with void_ext.patch(model, mode="skip", plan=plan) as handle:
        logits = model(ids, use_cache=False).logits
        assert not calls
        assert handle.counters.prompt.attention_projected == 0
        assert handle.counters.prompt.rows_needed == handle.counters.prompt.rows_computed
        run = torch.ones(3, 9, LAYERS, dtype=torch.bool)
        run[..., 2] = False
    assert_close(logits, reference.run_plan(model, ids, run, run).logits, NEAR)


@torch.no_grad()
def test_an_attention_that_is_a_subclass_projects(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    attention = model.model.layers[2].self_attn
    attention.__class__ = type("Mine", (type(attention),), {})
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, attention=[2], phase="prompt")) as handle:
        model(ids, use_cache=True)
        assert handle.counters.prompt.attention_projected == 1


@torch.no_grad()
def test_a_hook_that_writes_in_place_is_seen(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    model.model.layers[2].register_forward_hook(lambda module, args, output: output.mul_(3))
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2])) as handle:
        model(ids, use_cache=False)
        norms = handle.trace.prompt.norms
    assert_close(norms[..., 3], 3 * norms[..., 2], NEAR)


@torch.no_grad()
def test_a_cache_with_holes_can_be_saved(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    cache = DynamicCache(config=model.config)
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2])):
        model(ids, past_key_values=cache)
        restored = pickle.loads(pickle.dumps(cache))
        expected = model(ids[:, :1], past_key_values=cache).logits
        again = pickle.loads(pickle.dumps(restored))
        assert torch.equal(model(ids[:, :1], past_key_values=restored).logits, expected)
    with pytest.raises(CacheHoleError):
        model(ids[:, :1], past_key_values=again)


@torch.no_grad()
def test_a_plan_for_another_checkpoint_has_to_be_forced(tiny: Any, padded_batch: Any) -> None:
    model, other = tiny("llama"), tiny("llama")
    other.model.norm.weight.mul_(2)
    plan = VoidPlan.from_layers(other, skip=[2])
    with pytest.raises(ValueError, match="norm weights are not those"):
        void_ext.patch(model, mode="skip", plan=plan)
    with pytest.raises(ValueError, match="force: expected mode='skip'"):
        void_ext.patch(model, force=True)
    with void_ext.patch(model, mode="skip", plan=plan, force=True) as handle:
        model(padded_batch[0])
        assert handle.counters.prompt.layers_skipped == 1


@torch.no_grad()
def test_costs_choose_how_rows_that_differ_are_run(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    mlps = ((SKIP,) * LAYERS, (SKIP,) * LAYERS, (RUN,) * LAYERS)
    phase = PhasePlan(((RUN,) * LAYERS,) * 3, mlps)
    plan = VoidPlan(phase, phase)
    # Dispatching costs nothing, or rows cost nothing: packed, or dense.
    packed = void_ext.CostModel(floor=0.0, per_row=1.0, per_byte=0.0, launch=0.0, width=32, itemsize=4)
    dense = void_ext.CostModel(floor=0.0, per_row=0.0, per_byte=1.0, launch=1.0, width=32, itemsize=4)
    logits = []
    for costs, rows in ((packed, 9), (dense, 27)):
        with void_ext.patch(model, mode="skip", plan=plan, costs=costs) as handle:
            logits.append(model(ids).logits)
            assert handle.counters.prompt.rows_computed == LAYERS * (27 + rows)
            assert handle.counters.prompt.rows_needed == LAYERS * (27 + 9)
    assert_close(logits[0], logits[1], NEAR)
    with pytest.raises(TypeError, match="costs: expected a CostModel"):
        void_ext.patch(model, mode="skip", plan=plan, costs=1.0)


@torch.no_grad()
def test_a_saved_trace_knows_what_ran(tiny: Any, padded_batch: Any, tmp_path: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    with void_ext.patch(model, mode="skip", policy=PromptPlan(budget=2, at_least=2)) as handle:
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        trace = handle.trace
    trace.save(tmp_path / "trace.safetensors")
    loaded = void_ext.Trace.load(tmp_path / "trace.safetensors")
    assert not trace.response.executed.all()
    for phase in ("prompt", "response"):
        before, after = getattr(trace, phase), getattr(loaded, phase)
        assert torch.equal(before.executed, after.executed)
        assert torch.equal(before.active(0.3), after.active(0.3))
        assert not (after.active(0.0) & ~after.executed).any()
    trace.plot(tmp_path / "trace.png")
