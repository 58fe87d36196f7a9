"""Mode ``trace`` with ``fuse="add"`` changes no bit of an eager model's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext
from void_ext.testing.compare import assert_bits_equal

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
pytestmark = pytest.mark.usefixtures("ways_of_taking_norms")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "falcon"]
)
@torch.no_grad()
def test_prefill_and_decode(family: str, dtype: torch.dtype, attention: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny(family, dtype=dtype, attention=attention)
    ids, mask = padded_batch

    def run() -> list[torch.Tensor]:
        output = model(input_ids=ids, attention_mask=mask, use_cache=True)
        logits, longer = [output.logits], mask
        for _ in range(4):
            token = logits[-1][:, -1:].argmax(-1)
            longer = torch.cat([longer, longer.new_ones(len(mask), 1)], 1)
            output = model(
                input_ids=token, attention_mask=longer, past_key_values=output.past_key_values, use_cache=True
            )
            logits.append(output.logits)
        return logits

    expected = run()
    with void_ext.patch(model) as handle:
        actual = run()
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_bits_equal(ours, theirs, f"logits of step {step}", any_nan=True)
    assert handle.trace is not None
    assert handle.trace.prompt.norms.shape == (3, 9, 7)
    assert handle.trace.response.norms.shape == (3, 4, 7)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("fuse", ["add", "norm"])
def test_generate_gives_the_same_tokens(
    fuse: str, sample: bool, cache: str | None, tiny: Any, padded_batch: Any
) -> None:
    model = tiny("llama")
    ids, mask = padded_batch

    def run() -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=sample, cache_implementation=cache
        )

    expected = run()
    with void_ext.patch(model, fuse=fuse):
        assert torch.equal(run(), expected)
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@torch.no_grad()
def test_any_grad_mode_writes_the_same_norms(grad: Any, tiny: Any, padded_batch: Any) -> None:
    model = tiny("qwen2")
    ids, mask = padded_batch
    with grad():
        expected = model(input_ids=ids, attention_mask=mask)
    with void_ext.patch(model) as handle:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask)
        assert handle.trace is not None
        first = handle.trace.prompt.norms
        with grad():
            actual = model(input_ids=ids, attention_mask=mask)
        assert_bits_equal(actual.logits.detach(), expected.logits.detach(), "logits")
        torch.testing.assert_close(handle.trace.prompt.norms, first, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # norms by the op, and by torch
def test_gradients_flow_through_an_evaluated_model(dtype: torch.dtype, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama", dtype=dtype)
    ids, mask = padded_batch

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    expected = gradient()
    for fuse in ("add", "norm"):
        with void_ext.patch(model, fuse=fuse) as handle:
            assert_bits_equal(gradient(), expected, "gradient")
            assert handle.trace is not None
            assert not handle.trace.prompt.norms.requires_grad


def test_training_is_left_alone(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama").train()
    ids, mask = padded_batch
    with void_ext.patch(model) as handle:
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        assert handle.trace is None
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        assert handle.trace is not None


@torch.no_grad()
def test_autocast_promotes_as_before(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids, attention_mask=mask).logits
        with void_ext.patch(model) as handle:
            actual = model(input_ids=ids, attention_mask=mask).logits
    assert_bits_equal(actual, expected, "logits")
    assert handle.trace is not None
    assert bool((handle.trace.prompt.norms[mask.bool()] > 0).all())


@torch.no_grad()
def test_exit_under_autocast(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    ids, mask = padded_batch
    with torch.autocast("cpu", torch.float16), void_ext.patch(model, mode="exit") as handle:
        model(input_ids=ids, attention_mask=mask)
    assert handle.trace is not None


@torch.no_grad()
def test_a_norm_replaced_after_patching_is_called(tiny: Any, padded_batch: Any) -> None:
    ids, mask = padded_batch
    model = tiny("llama")
    with void_ext.patch(model, fuse="norm"):
        for part in ("input_layernorm", "post_attention_layernorm"):
            setattr(model.model.layers[2], part, torch.nn.Identity())
        actual = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(actual, model(input_ids=ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_fused_norms_stay_within_rounding(tiny: Any, padded_batch: Any) -> None:
    ids, mask = padded_batch
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model = tiny("llama", dtype=dtype)
        expected = model(input_ids=ids, attention_mask=mask).logits
        with void_ext.patch(model, fuse="norm", halves=True) as handle:
            actual = model(input_ids=ids, attention_mask=mask).logits
        scale = float(expected.float().abs().max())
        assert float((actual.float() - expected.float()).abs().max()) <= limit * scale
        with void_ext.patch(model, fuse="add", halves=True) as plain:
            model(input_ids=ids, attention_mask=mask)
        assert handle.trace is not None
        assert plain.trace is not None
        for name in ("norms", "halves"):
            ours, theirs = (getattr(h.trace.prompt, name) for h in (handle, plain))
            torch.testing.assert_close(ours, theirs, rtol=limit, atol=0)


@torch.no_grad()
def test_fused_norm_sees_a_stream_changed_between_layers(tiny: Any, padded_batch: Any) -> None:
    """Steering: a hook that changes a layer's output, in place or not, must reach the next layer's norm."""
    ids, mask = padded_batch

    def in_place(module: Any, args: Any, output: torch.Tensor) -> None:
        output.mul_(0.5)

    def replaced(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 0.5

    for hook in (in_place, replaced):
        for where in ("before", "after"):
            model = tiny("llama")
            if where == "before":
                model.model.layers[2].register_forward_hook(hook)
            void_ext.patch(model, fuse="norm")
            if where == "after":
                model.model.layers[2].register_forward_hook(hook)
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    actual = model(input_ids=ids, attention_mask=mask).logits
                    unpatched = tiny("llama")
                    unpatched.model.layers[2].register_forward_hook(hook)
                    expected = unpatched(input_ids=ids, attention_mask=mask).logits
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_output_hidden_states_are_the_models_own(tiny: Any, padded_batch: Any) -> None:
    model = tiny("mistral")
    ids, mask = padded_batch
    expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    with void_ext.patch(model) as handle:
        actual = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_bits_equal(ours, theirs, f"hidden state {index}")
    assert handle.trace is not None
    norms = handle.trace.prompt.norms
    for index, state in enumerate(expected[:-1]):  # the last one is already normed
        torch.testing.assert_close(norms[..., index], state.double().norm(dim=-1).float(), rtol=2e-6, atol=0)
