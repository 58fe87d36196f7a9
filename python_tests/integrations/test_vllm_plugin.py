"""The vLLM spike, run on a stand-in: modules called as vLLM calls them, and a registry. vLLM itself is not here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import void_ext
from void_ext import reference
from void_ext.integrations import vllm_plugin
from void_ext.testing.compare import assert_bits_equal, assert_close
from void_ext.testing.tolerance import tolerance


class StandInNorm(nn.Module):
    """vLLM's RMSNorm: with a residual, it adds first and gives both back."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return reference._ops.rms_norm(x, self.weight, self.variance_epsilon)
        stream = x + residual
        return reference._ops.rms_norm(stream, self.weight, self.variance_epsilon), stream


class StandInLayer(nn.Module):
    """vLLM's decoder layer: flat tokens, and an update that the next norm adds."""

    def __init__(self, layer: Any):
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = StandInNorm(layer.input_layernorm)
        self.post_attention_layernorm = StandInNorm(layer.post_attention_layernorm)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, rotary: Any) -> Any:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        embeddings = rotary(hidden_states[None], position_ids=positions[None])
        hidden_states = self.self_attn(
            hidden_states=hidden_states[None], position_embeddings=embeddings, attention_mask=None
        )[0][0]
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class StandInBody(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.embed_tokens, self.rotary = model.embed_tokens, model.rotary_emb
        self.layers = nn.ModuleList(StandInLayer(layer) for layer in model.layers)
        self.norm = StandInNorm(model.norm)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden_states, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual, self.rotary)
        return self.norm(hidden_states, residual)[0]


@torch.no_grad()
def test_norms_are_those_of_the_model_in_transformers(tiny: Any) -> None:
    model = tiny("llama")
    ids, positions = torch.randint(3, 96, (11,)), torch.arange(11)
    with void_ext.patch(model) as handle:
        model(input_ids=ids[None])
        expected = handle.trace.prompt.norms[0]
    body = StandInBody(model.model)
    before = body(ids, positions)
    taps = vllm_plugin.Taps(body, max_tokens=16)
    address = taps.table.data_ptr()
    assert_close(body(ids, positions), before, tolerance("logits", torch.float32))
    assert_close(taps.read(11), expected, tolerance("logits", torch.float32))
    assert taps.table[11:].count_nonzero() == 0
    first = taps.read(11)
    body(ids[:4], positions[:4])
    assert taps.table.data_ptr() == address
    assert_bits_equal(taps.read(11)[4:], first[4:], "rows of tokens that this forward does not have")
    taps.remove()
    taps.table.zero_()
    assert_bits_equal(body(ids, positions), before)
    assert taps.table.count_nonzero() == 0


@torch.no_grad()
def test_captured_whole_for_any_number_of_tokens(tiny: Any) -> None:
    body = StandInBody(tiny("llama", layers=2).model)
    taps = vllm_plugin.Taps(body, max_tokens=16)
    torch._dynamo.reset()
    compiled = torch.compile(body, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (7, 5, 9):
        ids, positions = torch.randint(3, 96, (tokens,)), torch.arange(tokens)
        expected, norms = body(ids, positions), taps.read(tokens)
        taps.table.zero_()
        assert_bits_equal(compiled(ids, positions), expected)
        assert_bits_equal(taps.read(tokens), norms)


def test_other_bodies_are_refused(tiny: Any) -> None:
    body = tiny("gpt2", layers=2).transformer
    with pytest.raises(ValueError, match=r"body: expected layers with an input_layernorm.*norm 0 of"):
        vllm_plugin.Taps(body, 16)
    with pytest.raises(ValueError, match="max_tokens=0"):
        vllm_plugin.Taps(StandInBody(tiny("llama", layers=2).model), 0)


class Registry:
    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, architecture: str, where: str) -> None:
        self.models[architecture] = where


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> Iterator[ModuleType]:
    """A module ``vllm`` with a registry and one model."""
    package = ModuleType("vllm")
    package.ModelRegistry = Registry()  # type: ignore[attr-defined]
    models = ModuleType("vllm.model_executor.models.llama")

    class LlamaForCausalLM(nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            super().__init__()
            self.model = StandInBody(tiny("llama", layers=2).model)

    models.LlamaForCausalLM = LlamaForCausalLM  # type: ignore[attr-defined]
    for name in ("vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, models.__name__, models)
    yield package
    vllm_plugin.__dict__.pop("LlamaForCausalLM", None)


def test_registers_nothing_unless_asked(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VOID_EXT_VLLM", raising=False)
    vllm_plugin.register()
    assert engine.ModelRegistry.models == {}
    monkeypatch.setenv("VOID_EXT_VLLM", "skip")
    with pytest.raises(ValueError, match="VOID_EXT_VLLM: expected 'trace' or nothing, got 'skip'"):
        vllm_plugin.register()


@torch.no_grad()
def test_registered_models_are_built_with_taps(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOID_EXT_VLLM", "trace")
    vllm_plugin.register()
    vllm_plugin.register()
    assert set(engine.ModelRegistry.models) == set(vllm_plugin.ARCHITECTURES)
    module, name = engine.ModelRegistry.models["LlamaForCausalLM"].split(":")
    traced = getattr(sys.modules[module], name)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=32))
    model = traced(vllm_config=config)
    assert isinstance(model, sys.modules["vllm.model_executor.models.llama"].LlamaForCausalLM)
    model.model(torch.arange(3, 8), torch.arange(5))
    assert model.void_ext_taps.read(5).min() > 0
    with pytest.raises(AttributeError, match="no attribute 'GPT2LMHeadModel'"):
        vllm_plugin.GPT2LMHeadModel  # noqa: B018


def test_loading_the_entry_point_is_light() -> None:
    """It runs in each process of every vLLM that shares an environment with this package."""
    code = (
        "import sys; from void_ext.integrations.vllm_plugin import register; register(); "
        "assert not {'transformers', 'vllm', 'void_ext.patching'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
