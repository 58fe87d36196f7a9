"""PEFT: adapters put on before or after patching, merged while patched, and prompts that are learned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import void_ext

peft = pytest.importorskip("peft")


def with_lora(model: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "qkv_proj", "up_proj", "gate_up_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config).eval()


def prompts(model: Any, kind: str) -> Any:
    torch.manual_seed(1)
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_an_adapter_before_patching(
    family: str, skips: bool, tiny: Any, greedy: Any, some_plan: Any, usual_trace: Any, same_trace: Any
) -> None:
    model = with_lora(tiny(family))
    plain = greedy(model)
    options = {"mode": "skip", "plan": some_plan(model, "prompt")} if skips else {}
    # Merged, the adapter is in the weights: the same model but for rounding.
    merged = copy.deepcopy(model).merge_and_unload()
    with void_ext.patch(model, **options) as handle:
        found = greedy(model)
        assert "fused (fuse='add')" in handle.describe()
    assert handle.trace is not None
    if skips:
        assert handle.counters.prompt.attention_projected > 0
        with void_ext.patch(merged, **options):
            plain = greedy(merged)
    assert torch.equal(found, plain)
    same_trace(handle.trace, usual_trace(merged, **options), exact=False)
    assert torch.equal(greedy(model), greedy(merged))


@pytest.mark.parametrize("skips", [False, True])
def test_an_adapter_after_patching_and_merged(
    skips: bool, tiny: Any, greedy: Any, some_plan: Any, same_trace: Any
) -> None:
    model = tiny("llama")
    before = greedy(model)
    options = {"mode": "skip", "plan": some_plan(model, "prompt")} if skips else {}
    reference = with_lora(copy.deepcopy(model))
    with void_ext.patch(reference, **options, **({"force": True} if skips else {})) as wanted:
        expected = greedy(reference)
    handle = void_ext.patch(model, **options)
    adapted = with_lora(model)
    assert void_ext.handle_of(adapted) is handle
    assert torch.equal(greedy(adapted), expected)
    assert handle.trace is not None
    same_trace(handle.trace, wanted.trace)
    with adapted.disable_adapter():
        if not skips:
            assert torch.equal(greedy(adapted), before)
    merged = adapted.merge_and_unload()
    assert torch.equal(greedy(merged), expected)
    same_trace(handle.trace, wanted.trace, exact=False)
    void_ext.unpatch(merged)
    assert not any("forward" in module.__dict__ for module in merged.modules())
    assert torch.equal(greedy(merged), greedy(reference.merge_and_unload()))


@pytest.mark.parametrize("fuse", ["add", "norm"])
@torch.no_grad()
def test_norms_replaced_after_patching(fuse: str, tiny: Any, padded_batch: Any) -> None:
    """Parts of a layer are looked up at each call, its norms and the final one too."""
    ids = padded_batch[0]

    def tuned(model: Any) -> Any:
        names = ["input_layernorm", "post_attention_layernorm", "norm"]
        model = peft.get_peft_model(model, peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=names)).eval()
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "ln_tuning_layers" in name:
                parameter.uniform_(0.5, 1.5)
        return model

    unpatched = tuned(tiny("llama"))
    expected = unpatched(input_ids=ids, output_hidden_states=True)
    model = tiny("llama")
    handle = void_ext.patch(model, fuse=fuse)
    model(ids)
    assert torch.equal(tuned(model)(input_ids=ids).logits, expected.logits)
    for index, state in enumerate(expected.hidden_states[:-1]):
        wanted = state.double().norm(dim=-1).float()
        torch.testing.assert_close(handle.trace.prompt.norms[..., index], wanted, rtol=2e-5, atol=1e-5)
    handle.unpatch()
    assert torch.equal(model(ids).logits, expected.logits)
    model = tiny("llama")
    with (
        void_ext.patch(model, mode="exit", fuse=fuse),
        pytest.raises(RuntimeError, match=r"the final norm that was found .* patch it again"),
    ):
        tuned(model)(input_ids=ids)


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24),
    reason="PEFT 0.21 looks for past_key_values, which transformers 5.24 renamed, and repeats the prompt at every step",
)
@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("skips", [False, True])
def test_learned_prompts(
    skips: bool, when: str, kind: str, tiny: Any, greedy: Any, some_plan: Any, padded_batch: Any
) -> None:
    """Virtual tokens have rows where they go through the layers (prompt tuning). Where they are keys and values alone
    (prefix tuning), the prompt's positions begin behind theirs."""
    model = tiny("llama")
    expected = greedy(prompts(copy.deepcopy(model), kind))
    options = {"mode": "skip", "plan": some_plan(model)} if skips else {}
    if when == "before":
        model = prompts(model, kind)
        handle = void_ext.patch(model, **options)
    else:
        handle = void_ext.patch(model, **options)
        model = prompts(model, kind)
    found = greedy(model)
    trace = handle.trace
    assert trace is not None
    if not skips:
        assert torch.equal(found, expected)
    first = 4 if kind == "PrefixTuning" else 0
    assert trace.prompt.positions == list(range(first, 13))
    assert trace.response.positions == list(range(13, 18))
    mask = padded_batch[1].bool()
    if kind == "PromptTuning":
        mask = torch.cat([torch.ones(3, 4, dtype=torch.bool), mask], 1)
        assert bool((trace.prompt.tokens == -1).all())
    assert torch.equal(trace.prompt.mask, mask)
    assert torch.equal(trace.response.tokens, found[:, -6:-1])
    assert bool(trace.response.mask.all())
    assert bool(trace.response.executed.all()) is not skips
    with pytest.raises(ValueError, match="prefill_chunk_size: expected None"):
        greedy(model, prefill_chunk_size=4)
    ids = padded_batch[0][:1]
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert handle.trace.response.mask.tolist() == [[True, True]]  # the last row is where a single row ends
    handle.unpatch()
    assert torch.equal(greedy(model), expected)
