"""Which forward runs: fused only where the layer's own is known, else the generic one; the same trace from both."""

from __future__ import annotations

import types
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

import void_ext
from void_ext.patching import registry

PRE_NORM = ("llama", "mistral", "qwen2")
FUSED = (*PRE_NORM, "qwen3", "mixtral", "phi3", "olmo2")
if int(transformers.__version__.split(".")[0]) >= 5:
    FUSED = (*FUSED, "gemma2")  # its layers return a tuple in 4.57
pytestmark = pytest.mark.usefixtures("ways_of_taking_norms")


@pytest.mark.parametrize(
    "family",
    [*FUSED, "gpt2", "gpt_neox", "opt", "bloom", "falcon"],
)
@torch.no_grad()
def test_norms_of_every_family(family: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny(family)
    ids, mask = padded_batch
    with void_ext.patch(model) as handle:
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    if family in FUSED:
        assert "fused (fuse='add')" in handle.describe()
    assert handle.trace is not None
    norms = handle.trace.prompt.norms
    for index, hidden in enumerate(states[:-1]):  # the last one is already normed
        torch.testing.assert_close(norms[..., index], hidden.double().norm(dim=-1).float(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["trace", "exit"])
@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_fused_equals_generic(family: str, mode: str, tiny: Any, padded_batch: Any, monkeypatch: Any) -> None:
    model = tiny(family)
    ids, mask = padded_batch
    with void_ext.patch(model, mode=mode, alpha=0.3) as fused:
        expected = model(input_ids=ids, attention_mask=mask).logits
    monkeypatch.setattr(registry, "LAYER_FORWARDS", {})
    with void_ext.patch(model, mode=mode, alpha=0.3) as generic:
        assert "generic" in generic.describe()
        assert "is not one of the forwards known" in generic.describe()
        actual = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(actual, expected)
    assert fused.trace is not None
    assert generic.trace is not None
    assert torch.equal(fused.trace.prompt.norms, generic.trace.prompt.norms)


@torch.no_grad()
def test_a_changed_forward_is_not_fused(tiny: Any, padded_batch: Any, monkeypatch: Any) -> None:
    ids, mask = padded_batch

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = residual + 0.5 * hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    for where in ("instance", "class"):
        model = tiny("llama")
        with monkeypatch.context() as patch:
            if where == "instance":
                model.model.layers[4].forward = types.MethodType(forward, model.model.layers[4])
            else:
                patch.setattr(LlamaDecoderLayer, "forward", forward)
            expected = model(input_ids=ids, attention_mask=mask).logits
            with void_ext.patch(model) as handle:
                text = handle.describe()
                assert "generic" in text
                assert ("replaced on the instance" if where == "instance" else "is not one of the forwards") in text
                assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_a_changed_norm_is_not_fused(tiny: Any, padded_batch: Any, monkeypatch: Any) -> None:
    ids, mask = padded_batch
    model = tiny("llama")
    for module in model.modules():  # weights of one would hide a scale that is not applied
        if isinstance(module, LlamaRMSNorm):
            module.weight.uniform_(0.5, 1.5)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: 0.1 * x)
    expected = model(input_ids=ids, attention_mask=mask).logits
    with void_ext.patch(model, fuse="norm"):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.bfloat16, "native"), (torch.float64, "plain torch, for there are no kernels for float64")],
    ids=str,
)
def test_describe_says_what_takes_the_norms(dtype: torch.dtype, said: str, tiny: Any) -> None:
    with void_ext.patch(tiny("llama", dtype=dtype)) as handle:
        assert f"\n  kernels   {said}\n" in handle.describe()


def test_digest_ignores_what_does_not_matter() -> None:
    def one(self: Any, x: int) -> int:
        """A docstring."""
        return x + 1  # a comment

    def two(self, x):  # type: ignore[no-untyped-def]
        return x + 1

    def three(self: Any, x: int) -> int:
        return x + 2

    def four(self: Any, y: int) -> int:
        return y + 1

    assert registry.digest(one) == registry.digest(two)
    assert len({registry.digest(f) for f in (one, three, four)}) == 3


def test_digest_sees_through_a_renamed_cache() -> None:
    """transformers 5.24 calls ``past_key_values`` ``cache``, and gives it more arguments; nothing else may differ."""

    def before(self, x, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        return past_key_values.update(x, x, self.index), self.inner(x, past_key_values=past_key_values)

    def after(self, x, cache=None, **kwargs):  # type: ignore[no-untyped-def]
        return cache.update(x, x, self.index, kwargs=kwargs), self.inner(x, cache=cache)

    def other(self, x, cache=None, **kwargs):  # type: ignore[no-untyped-def]
        return cache.update(x, x, self.index, kwargs=kwargs), self.inner(x, cache=None)

    assert registry.digest(before) == registry.digest(after)
    assert registry.digest(before) != registry.digest(other)


def test_installed_families_are_known(tiny: Any) -> None:
    """The registry knows the transformers that is installed; a new release that changes a forward shows here first."""
    for family in FUSED:
        form, why = registry.layer_form(tiny(family).model.layers[0])
        assert form is not None, why
    for family in PRE_NORM:
        assert registry.rms_norm_form(tiny(family).model.norm)


@torch.no_grad()
def test_hooks_of_others_run_once_each(tiny: Any, padded_batch: Any) -> None:
    """Norms, attention and MLP are called as modules, so that hooks on them go on working in both forwards."""
    ids, mask = padded_batch
    for fuse in ("add", "norm"):
        model = tiny("llama")
        counts: Counter[str] = Counter()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, a, o, name=name, counts=counts: counts.update([name]))
        model(input_ids=ids, attention_mask=mask)
        expected = Counter(counts)
        counts.clear()
        with void_ext.patch(model, fuse=fuse):
            model(input_ids=ids, attention_mask=mask)
        assert counts == expected
