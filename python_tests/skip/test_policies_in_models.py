"""Policies at work in a model: when they are asked, what they see, what then runs."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
import torch

import void_ext
from void_ext import ops, reference
from void_ext.patching import skipping
from void_ext.plan import Action, PhasePlan, VoidPlan
from void_ext.policies import HaltPlan, History, Policy, PromptPlan, RefreshPlan
from void_ext.testing import assert_close, tolerance

LAYERS = 6
NEAR = tolerance("oracle", torch.float32)


def generate(model: Any, batch: Any, **settings: Any) -> torch.Tensor:
    ids, mask = batch
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, **settings}
    return model.generate(ids, attention_mask=mask, **settings)


def positions(mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What generate() makes of a left-padded mask: the mask and the position ids of the whole sequence."""
    whole = torch.cat([mask, torch.ones(mask.shape[0], length - mask.shape[1]).long()], 1)
    return whole, (whole.cumsum(-1) - 1).clamp_min(0)


def check_against_the_oracle(model: Any, out: torch.Tensor, mask: torch.Tensor, trace: Any) -> None:
    """The tokens are the oracle's, given what the trace says ran (PROJECT leaves no hole)."""
    executed = torch.cat([trace.prompt.executed, trace.response.executed], 1)
    whole, ids = positions(mask, out.shape[1] - 1)
    expected = reference.run_plan(model, out[:, :-1], executed, executed, mask=whole, positions=ids)
    logits = expected.logits[:, mask.shape[1] - 1 :]
    logits[..., model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens does
    assert torch.equal(out[:, mask.shape[1] :], logits.argmax(-1))
    norms = torch.stack([stream.double().norm(dim=-1).float() for stream in expected.streams], -1)
    assert_close(trace.response.norms, norms[:, mask.shape[1] :], NEAR, "norms")


class Asked(Policy):
    """Notes when it is asked and what it is shown."""

    def __init__(self, every_token: bool = False, answers: Any = ()):
        self.every_token = every_token
        self.asked: list[tuple[int | None, str]] = []
        self.answers = list(answers)

    def decide(self, history: History | None, phase: str) -> Any:
        self.asked.append((None if history is None else len(history.phases), phase))
        if history is not None:
            assert history.norms.shape[1] == len(history.phases) == history.executed.shape[1] == history.mask.shape[1]
        return self.answers.pop(0) if self.answers else None


@pytest.mark.parametrize("cache", [None, "static"])
def test_when_policies_are_asked(cache: str | None, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    policy = Asked()
    with void_ext.patch(model, mode="skip", policy=policy):
        generate(model, padded_batch, max_new_tokens=4, min_new_tokens=4, cache_implementation=cache)
    assert policy.asked == [(None, "prompt"), (9, "response")]
    policy = Asked(every_token=True)
    with void_ext.patch(model, mode="skip", policy=policy):
        generate(model, padded_batch, max_new_tokens=4, min_new_tokens=4, cache_implementation=cache)
    assert policy.asked == [(None, "prompt"), (9, "response"), (10, "response"), (11, "response")]


@torch.no_grad()
def test_a_further_prompt_is_a_prompt(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1]
    policy = Asked()
    with void_ext.patch(model, mode="skip", policy=policy):
        cache = model(ids, use_cache=True).past_key_values
        for tokens in (ids[:, :1], ids[:, :1], ids[:, :3], ids[:, :1]):
            model(tokens, past_key_values=cache)
    assert policy.asked == [(None, "prompt"), (9, "response"), (11, "prompt"), (14, "response")]


def test_a_table_governs_two_tokens_later(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    table = torch.ones(3, LAYERS, dtype=torch.bool)
    table[0, 2] = table[1, 3] = False
    policy = Asked(every_token=True, answers=[None, None, table])
    policy.by_row = True
    with void_ext.patch(model, mode="skip", policy=policy) as handle:
        out = generate(model, padded_batch)
        executed = handle.trace.response.executed
        check_against_the_oracle(model, out, padded_batch[1], handle.trace)
    assert executed[:, :2].all()  # asked before token 1, with the table: token 1 still runs all
    assert torch.equal(executed[:, 2:], table[:, None].expand(-1, executed.shape[1] - 2, -1))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_prompt_plan(family: str, granularity: str, cache: str | None, tiny: Any, padded_batch: Any) -> None:
    model = tiny(family)
    policy = PromptPlan(0.8, granularity, budget=2, protect_default=False)
    with void_ext.patch(model, mode="skip", policy=policy) as handle:
        out = generate(model, padded_batch, cache_implementation=cache)
        check_against_the_oracle(model, out, padded_batch[1], handle.trace)
        trace, counters = handle.trace, handle.counters
    skipped = (~trace.response.executed).sum(-1)
    assert trace.prompt.executed.all()
    assert int(skipped.max()) in (1, 2)
    assert torch.equal(trace.response.executed, trace.response.executed[:, :1].expand_as(trace.response.executed))
    if granularity == "batch":
        assert counters.response.rows_computed == counters.response.rows_needed
        assert counters.response.attention_projected > 0


def test_prompt_plan_by_hand(tiny: Any, padded_batch: Any) -> None:
    """Void in more than half of a row's real prompt tokens, and nothing else, decides."""
    model = tiny("qwen2", seed=2)
    with void_ext.patch(model, mode="skip", policy=PromptPlan(0.4)) as handle:
        generate(model, padded_batch)
        trace = handle.trace
    active = trace.prompt.active(0.4)
    for row in range(3):
        real = trace.prompt.mask[row]
        share = (~active[row][real]).float().mean(0)
        for layer in range(LAYERS):
            expected = share[layer] > 0.5 and layer not in (0, 1, LAYERS - 1)
            assert bool(trace.response.executed[row, 0, layer]) != bool(expected)


@torch.no_grad()
def test_caches_in_turns(tiny: Any, padded_batch: Any, recwarn: pytest.WarningsRecorder) -> None:
    """A thread has one trace: back at an earlier cache there is no prompt in it to decide by, and that is said."""
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)[:1]
    with void_ext.patch(model, mode="skip", policy=PromptPlan(budget=2, at_least=2)) as handle:
        caches = []
        for prompt in (ids, ids[:, 3:]):
            caches.append(model(prompt, use_cache=True).past_key_values)
            model(ids[:, :1], past_key_values=caches[-1])
            assert handle.plan.response.skipped == 2
        assert not recwarn.list
        with pytest.warns(UserWarning, match="no token of the prompt is in the trace.*a thread of its own"):
            model(ids[:, :1], past_key_values=caches[0])
        assert handle.plan.response.is_dense
        assert handle.trace.response.positions == [ids.shape[1] + 1]
        model(ids[:, 4:7], past_key_values=caches[0])  # more of a prompt is something to decide by
        model(ids[:, :1], past_key_values=caches[0])
        assert handle.plan.response.skipped == 2


@pytest.mark.parametrize("signal", ["abs_delta", "relative_update", "cosine"])
def test_other_signals_bring_what_they_need(signal: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    policy = PromptPlan(signal=signal, budget=2)
    with void_ext.patch(model, mode="skip", policy=policy) as handle:
        generate(model, padded_batch)
        trace = handle.trace
    assert ((~trace.response.executed[:, 0]).sum(-1) == 2).all()
    assert (trace.response.updates is not None) == (signal != "abs_delta")
    if trace.response.updates is not None:
        skipped = ~trace.response.executed
        assert (trace.response.updates[skipped] == 0).all()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("granularity", ["token", "batch"])
def test_refresh_plan(granularity: str, cache: str | None, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    runs = []
    for _ in range(2):
        policy = RefreshPlan(4, alpha=0.8, granularity=granularity, protect_default=False)
        with void_ext.patch(model, mode="skip", policy=policy) as handle:
            out = generate(model, padded_batch, cache_implementation=cache)
            check_against_the_oracle(model, out, padded_batch[1], handle.trace)
            trace = handle.trace
        runs.append((out, trace.response.executed))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    executed = runs[0][1]
    active = trace.response.active(0.8)
    for t in range(executed.shape[1]):
        if t % 4 < 2:
            assert executed[:, t].all()
        elif granularity == "token":
            assert torch.equal(executed[:, t], active[:, t - t % 4])
        else:
            assert torch.equal(executed[:, t], executed[:1, t].expand(3, -1))
    assert not executed.all()


def test_refresh_plan_needs_a_cache(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    with (
        void_ext.patch(model, mode="skip", policy=RefreshPlan(4)),
        pytest.raises(ValueError, match="RefreshPlan decides for every token and needs a KV cache"),
    ):
        generate(model, padded_batch, use_cache=False)


@pytest.mark.parametrize("protect", [(), (4,)])
@pytest.mark.parametrize("fuse", ["add", "norm"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_halt_plan(cache: str | None, fuse: str, protect: tuple[int, ...], tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    policy = HaltPlan(0.8, protect=protect, protect_default=False)
    with void_ext.patch(model, mode="skip", policy=policy, fuse=fuse) as handle:
        out = generate(model, padded_batch, cache_implementation=cache)
        check_against_the_oracle(model, out, padded_batch[1], handle.trace)
        trace = handle.trace
    real = trace.prompt.mask
    for part, rows in ((trace.prompt, real), (trace.response, torch.ones_like(trace.response.mask))):
        executed = part.executed[rows]
        # A token's layers run up to its first void, and the protected ones.
        ran = ops.void_mask(part.norms[rows], 0.8, executed)
        for token in range(executed.shape[0]):
            halted = False
            for layer in range(LAYERS):
                assert bool(executed[token, layer]) == (not halted or layer in protect)
                halted = halted or (bool(executed[token, layer]) and not bool(ran[token, layer]))
    assert not trace.prompt.executed.all()


@pytest.mark.parametrize("signal", ["delta", "abs_delta", "relative_update", "cosine"])
@pytest.mark.parametrize("granularity", ["sequence", "batch"])
def test_halt_plan_of_rows_together(granularity: str, signal: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    policy = HaltPlan(0.9, granularity=granularity, signal=signal, protect_default=False)
    with void_ext.patch(model, mode="skip", policy=policy) as handle:
        out = generate(model, padded_batch)
        check_against_the_oracle(model, out, padded_batch[1], handle.trace)
        trace = handle.trace
    for part in (trace.prompt, trace.response):
        for token in range(part.executed.shape[1]):
            # What halts together in a forward: the prompt of a row, or all of it; a token of all rows.
            shared = part.executed[:, 0] if part is trace.prompt else part.executed[:, token]
            assert torch.equal(part.executed[:, token], shared)
            if granularity == "batch":
                assert (shared == shared[0]).all()
    assert not trace.prompt.executed.all()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("skip all", "expected a VoidPlan, a bool tensor or None, got str"),
        (torch.ones(2, LAYERS, dtype=torch.bool), r"expected a tensor \[3, 6\]"),
        (torch.ones(3, LAYERS), "expected a tensor of torch.bool"),
        (VoidPlan.dense(LAYERS + 1), "expected a plan for 6 layers, got one for 7"),
    ],
)
@torch.no_grad()
def test_wrong_decisions_change_nothing(answer: Any, message: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, _ = padded_batch
    policy = Asked(answers=[None, answer])
    with void_ext.patch(model, mode="skip", policy=policy):
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises((TypeError, ValueError), match=message):
            model(ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 9
        model(ids[:, :1], past_key_values=cache)


def test_a_policy_of_ones_own_is_a_small_class(tiny: Any, padded_batch: Any) -> None:
    class EveryOther(Policy):
        def decide(self, history: History | None, phase: str) -> VoidPlan | None:
            if history is None:
                return None
            keep = tuple(Action.RUN if layer % 2 == 0 else Action.PROJECT for layer in range(history.layers))
            mlp = tuple(Action.RUN if layer % 2 == 0 else Action.SKIP for layer in range(history.layers))
            return VoidPlan(PhasePlan.dense(history.layers), PhasePlan(keep, mlp))

    model = tiny("llama")
    with void_ext.patch(model, mode="skip", policy=EveryOther()) as handle:
        out = generate(model, padded_batch)
        check_against_the_oracle(model, out, padded_batch[1], handle.trace)
    assert handle.trace.response.executed[0, 0].tolist() == [True, False] * 3


def test_policies_that_tell_rows_apart_are_refused_for_beams(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model, mode="skip", policy=PromptPlan()) as handle:
        with pytest.raises(ValueError, match="PromptPlan may decide otherwise for each row"):
            generate(model, padded_batch, num_beams=2)
        assert handle.trace is None
    with void_ext.patch(model, mode="skip", policy=PromptPlan(granularity="batch", budget=1)) as handle:
        generate(model, padded_batch, num_beams=2)
        assert handle.counters.response.attention_projected > 0


WAITS = {"item", "cpu", "nonzero", "numpy", "argwhere", "masked_select", "is_nonzero", "allclose", "equal"}


def test_nothing_on_the_path_of_a_token_waits_for_the_device() -> None:
    """By the source: no call that reads the device back where a decision is made or a plan applied."""
    from void_ext import _ranking
    from void_ext.patching import call, ledger, schedule, skip

    sources = [RefreshPlan, HaltPlan, _ranking, call, ledger, schedule, skip, skipping]
    for source in sources:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(source)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in WAITS, f"{source.__name__} line {node.lineno}: .{node.func.attr}()"
