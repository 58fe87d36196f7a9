"""Quantised linears are modules like any other: what they are inside, nobody looks at."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import void_ext
from void_ext import VoidPlan


class PackedLinear(nn.Module):
    """Int8 rows with a scale each, all in buffers, as GPTQ and AWQ keep theirs."""

    features = ("in_features", "out_features")

    def __init__(self, linear: nn.Linear):
        super().__init__()
        for name, size in zip(self.features, (linear.in_features, linear.out_features), strict=True):
            setattr(self, name, size)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales, self.bias)


class OldPackedLinear(PackedLinear):
    features = ("infeatures", "outfeatures")  # as auto_gptq calls them


def packed(model: Any, kind: type[PackedLinear] = PackedLinear) -> Any:
    for module in model.model.layers.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))
    return model


def packed_as_of_old(model: Any) -> Any:
    return packed(model, OldPackedLinear)


def dynamic_int8(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves its quantisation to torchao
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("quantise", [packed, packed_as_of_old, dynamic_int8])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_traced(family: str, quantise: Any, tiny: Any, greedy: Any) -> None:
    model = quantise(tiny(family))
    expected = greedy(model)
    with void_ext.patch(model) as handle:
        assert torch.equal(greedy(model), expected)
        assert "fused (fuse='add')" in handle.describe()
        assert handle.trace is not None
        trace = handle.trace
        with torch.no_grad():
            states = model(trace.prompt.tokens, trace.prompt.mask.long(), output_hidden_states=True).hidden_states
    for index, state in enumerate(states[:-1]):
        wanted = state.double().norm(dim=-1).float()
        torch.testing.assert_close(trace.prompt.norms[..., index], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantise", [packed, dynamic_int8])
@pytest.mark.parametrize("family", ["llama", "phi3"])
@torch.no_grad()
def test_skipped(family: str, quantise: Any, tiny: Any, padded_batch: Any) -> None:
    model, lacking = quantise(tiny(family)), quantise(tiny(family))
    lacking.model.layers[2] = Passing()
    ids = padded_batch[0]
    expected = lacking(ids, use_cache=False).logits
    whole = model(ids, use_cache=True).past_key_values
    with void_ext.patch(model, mode="skip", plan=VoidPlan.from_layers(model, skip=[2], phase="prompt")) as handle:
        out = model(ids, use_cache=True)
    assert torch.equal(out.logits, expected)
    # K and V alone, made by the quantised projections as they are.
    assert torch.equal(out.past_key_values.layers[2].keys, whole.layers[2].keys)
    assert torch.equal(out.past_key_values.layers[2].values, whole.layers[2].values)
    halves = handle._recorder.skipper.weight_bytes[0]
    # A byte a weight, and no more than five for each row of one: int8 weights are counted, as what they are.
    weights, rows = 32 * 32 + 2 * 32 * 16 + 32 * 32, 32 + 16 + 16 + 32
    assert weights <= halves.attention <= weights + 5 * rows + 4 * 32


class Passing(nn.Module):
    attention_type = "full_attention"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def test_quantising_a_patched_model_makes_a_patched_copy(tiny: Any, greedy: Any) -> None:
    model = tiny("llama")
    expected = greedy(dynamic_int8(model))
    with void_ext.patch(model) as handle:
        copied = dynamic_int8(model)
        assert torch.equal(greedy(copied), expected)
        assert handle.trace is None
        other = void_ext.handle_of(copied)
        assert other.trace is not None
        assert other.trace.response.norms.shape == (3, 5, 7)
        other.unpatch()
        assert torch.equal(greedy(copied), expected)
