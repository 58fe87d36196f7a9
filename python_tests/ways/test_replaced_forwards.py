"""Libraries that replace forwards: Liger on classes, in modules and on instances; kernels from the hub on instances.

The stand-ins put other forwards in place exactly as those libraries do; what they compute is telling, not fast.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama import modeling_llama

import void_ext
from void_ext import VoidPlan
from void_ext.testing.compare import assert_bits_equal


class OtherNorm(torch.nn.Module):
    """As LigerRMSNorm: the same weights and eps, another formula (here one that shows)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, **kwargs: Any):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states / (hidden_states.abs().amax(-1, keepdim=True) + self.variance_epsilon)


class OtherMLP(torch.nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = torch.nn.Linear(size, inner, bias=False)
        self.up_proj = torch.nn.Linear(size, inner, bias=False)
        self.down_proj = torch.nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


def other_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """As liger_rotary_pos_emb: it takes queries, and writes to both."""
    if q.shape[1] == 0:
        raise RuntimeError("a kernel without rows cannot be launched")
    half = q.shape[-1] // 2
    for states in (q, k):
        turned = torch.cat((-states[..., half:], states[..., :half]), -1)
        states.copy_(states * cos.unsqueeze(1) + turned * sin.unsqueeze(1))
    return q, k


def halved(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    update, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    stream = hidden_states + 0.5 * update
    return stream + self.mlp(self.post_attention_layernorm(stream))


def lce_forward(self: Any, input_ids: Any = None, logits_to_keep: int = 0, **kwargs: Any) -> Any:
    """As Liger's: the class's own forward with another loss."""
    kwargs.pop("labels", None)
    outputs = self.model(input_ids=input_ids, **kwargs)
    return transformers.modeling_outputs.CausalLMOutputWithPast(
        logits=self.lm_head(outputs.last_hidden_state), past_key_values=outputs.past_key_values
    )


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """``apply_liger_kernel_to_llama()``: names in the module and a class's forward, for models made from now on."""
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", OtherNorm)
    monkeypatch.setattr(modeling_llama, "LlamaMLP", OtherMLP)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other_rotary)
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", lce_forward)


def check_norms(model: Any, trace: Any) -> None:
    with torch.no_grad():
        states = model.model(trace.prompt.tokens, trace.prompt.mask.long(), output_hidden_states=True).hidden_states
    for index, state in enumerate(states[:-1]):
        wanted = state.double().norm(dim=-1).float()
        torch.testing.assert_close(trace.prompt.norms[..., index], wanted, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("fuse", ["add", "norm"])
def test_liger_on_classes(fuse: str, liger: None, tiny: Any, greedy: Any) -> None:
    """Halves and norms are called as modules, whatever they are; norms of another formula are not fused."""
    model = tiny("llama")
    assert type(model.model.norm) is OtherNorm
    expected = greedy(model)
    with void_ext.patch(model, fuse=fuse) as handle:
        assert torch.equal(greedy(model), expected)
        trace = handle.trace
    check_norms(model, trace)
    assert torch.equal(greedy(model), expected)
    assert modeling_llama.LlamaForCausalLM.forward is lce_forward
    assert not any(type(value).__module__.startswith("void_ext") for m in model.modules() for value in vars(m).values())


@torch.no_grad()
def test_keys_and_values_through_ligers_rotary(liger: None, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0]
    whole = model(ids, use_cache=True).past_key_values
    for packed in (False, True):
        if packed:
            model = tiny("phi3")
            whole = model(ids, use_cache=True).past_key_values
        plan = VoidPlan.from_layers(model, attention=[2], phase="prompt")
        with void_ext.patch(model, mode="skip", plan=plan) as handle:
            made = model(ids, use_cache=True).past_key_values
            assert handle.counters.prompt.attention_projected == 1
        torch.testing.assert_close(made.layers[2].keys, whole.layers[2].keys)
        torch.testing.assert_close(made.layers[2].values, whole.layers[2].values)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("fuse", ["add", "norm"])
def test_liger_on_an_instance(fuse: str, when: str, tiny: Any, greedy: Any) -> None:
    """``apply_liger_kernel_to_llama(model=model)``, and kernelize() of a model loaded with ``use_kernels=True``."""
    model, unpatched = tiny("llama"), tiny("llama")
    for either in (model, unpatched):
        for module in either.modules():
            if "RMSNorm" in type(module).__name__:
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)

    def replace(which: Any) -> None:
        for module in which.modules():
            for stem, other in (("RMSNorm", OtherNorm), ("MLP", OtherMLP)):
                if stem in type(module).__name__:
                    module.forward = types.MethodType(other.forward, module)

    unpatched.load_state_dict(model.state_dict())
    replace(unpatched)
    shows = {"output_logits": True, "return_dict_in_generate": True}  # tokens do not tell how the last norm scales
    expected = greedy(unpatched, **shows)
    if when == "before":
        replace(model)
    with void_ext.patch(model, fuse=fuse) as handle:
        if when == "after":
            greedy(model)
            replace(model)
        found = greedy(model, **shows)
        trace = handle.trace
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        if fuse == "add":
            assert_bits_equal(ours, theirs, "logits")
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    check_norms(unpatched, trace)
    assert torch.equal(greedy(model), expected.sequences)  # the library's forwards are still there


@pytest.mark.parametrize("where", ["class", "wrapped class", "instance"])
def test_a_layers_forward_replaced_before_patching(
    where: str, tiny: Any, greedy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detected by what it does, not by its name: hooks watch such layers, and nothing of them is run in another way."""
    model = tiny("llama")
    plain = greedy(model)
    cls = modeling_llama.LlamaDecoderLayer
    if where == "instance":
        for layer in model.model.layers:
            layer.forward = types.MethodType(halved, layer)
    elif where == "class":
        monkeypatch.setattr(cls, "forward", halved)
    else:
        own = cls.forward

        @functools.wraps(own)
        def wrapper(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return own(self, hidden_states, *args, **kwargs) * 1.5

        monkeypatch.setattr(cls, "forward", wrapper)
    expected = greedy(model)
    assert not torch.equal(plain, expected)
    with void_ext.patch(model) as handle:
        text = handle.describe()
        assert "generic" in text
        reason = {"class": "is not one of the forwards", "wrapped class": "wrapped in", "instance": "on the instance"}
        assert reason[where] in text
        assert torch.equal(greedy(model), expected)
        trace = handle.trace
    check_norms(model, trace)
    with pytest.raises(void_ext.UnsupportedModelError, match="needs a model with a fused forward"):
        void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2]))
    assert torch.equal(greedy(model), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layers_forward_replaced_after_patching(
    family: str, tiny: Any, greedy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours would hide it where it is fused, so the call is refused; hooks go on watching what is there."""
    model = tiny(family)
    cls = type(model.model.layers[0] if family == "llama" else model.transformer.h[0])
    own = cls.forward
    handle = void_ext.patch(model)
    greedy(model)

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", other)
    if family == "gpt2":
        greedy(model)
        handle.unpatch()
        return
    with pytest.raises(RuntimeError, match=r"LlamaDecoderLayer\.forward was replaced on its class .* patch it again"):
        greedy(model)
    handle.unpatch()
    expected = greedy(model)
    with void_ext.patch(model) as again:
        assert torch.equal(greedy(model), expected)
        assert "generic" in again.describe()


def test_an_attention_replaced_on_the_instance_makes_no_keys(tiny: Any) -> None:
    model = tiny("llama")
    attention = model.model.layers[2].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
    plan = VoidPlan.from_layers(model, attention=[3])
    with pytest.raises(void_ext.UnsupportedModelError, match=r"cannot make K and V alone .* replaced on the instance"):
        void_ext.patch(model, mode="skip", plan=plan)
    void_ext.patch(model).unpatch()


@pytest.mark.parametrize("when", ["before", "after"])
def test_use_kernels(when: str, tiny: Any, greedy: Any) -> None:
    """transformers says itself that it lacks the package ``kernels``. With it, whatever it puts in place is run."""
    from transformers.utils import is_kernels_available

    model = tiny("llama")
    if not hasattr(model, "set_use_kernels"):
        pytest.skip("this transformers has no set_use_kernels")
    handle = void_ext.patch(model) if when == "after" else None
    if not is_kernels_available():
        with pytest.raises((ImportError, ValueError), match=r"[Kk]ernels"):
            model.set_use_kernels(True)
        return
    model.set_use_kernels(True)
    assert "forward" in model.model.norm.__dict__
    handle = void_ext.patch(model, fuse="norm") if handle is None else handle
    found = greedy(model)
    trace = handle.trace
    handle.unpatch()
    assert torch.equal(found, greedy(model))
    assert "forward" in model.model.norm.__dict__
    check_norms(model, trace)


@torch.no_grad()
def test_a_forward_under_a_decorator_of_torchs_is_called(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's decorators may change what a forward computes."""
    layer = modeling_llama.LlamaDecoderLayer
    monkeypatch.setattr(layer, "forward", torch.autocast("cpu", dtype=torch.bfloat16)(layer.forward))
    model = tiny("llama")
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    with void_ext.patch(model) as handle:
        assert "generic" in handle.describe()
        assert torch.equal(model(ids).logits, expected)
    with pytest.raises(void_ext.UnsupportedModelError, match="'skip' needs"):
        void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2]))
