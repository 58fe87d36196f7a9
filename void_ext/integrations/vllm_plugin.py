"""A first step towards vLLM: norms of its residual stream, for the add that its RMSNorms do anyway. See docs/vllm.md.

It was written against vLLM's published source and run on a stand-in that calls modules as vLLM does, never in vLLM. The
entry point ``vllm.general_plugins`` calls :func:`register` in each of vLLM's processes; without ``VOID_EXT_VLLM=trace``
that does nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

#: architectures whose layers hand on (update, residual): name in vLLM's registry -> module of vLLM
ARCHITECTURES = {
    "LlamaForCausalLM": "vllm.model_executor.models.llama",
    "MistralForCausalLM": "vllm.model_executor.models.mistral",
    "Qwen2ForCausalLM": "vllm.model_executor.models.qwen2",
    "Qwen3ForCausalLM": "vllm.model_executor.models.qwen3",
}


class TapNorm:
    """An instance ``forward`` for an RMSNorm ``(x, residual=None)`` that adds before it norms: one fused op does that
    add, the RMSNorm and the norm of the sum, which goes to ``column`` of ``table``."""

    def __init__(self, norm: nn.Module, table: Tensor, column: int):
        self.norm: Any = norm
        self.table = table
        self.column = column

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Any:
        ops: Any = torch.ops.void_ext
        norm = self.norm
        if residual is None:  # the embedding, in front of layer 0
            ops.row_l2norm.default(x, self.table, self.column)
            return type(norm).forward(norm, x)
        stream, normed = ops.add_rms_norm.default(
            residual, x, norm.weight, norm.variance_epsilon, self.table, self.column
        )
        return normed, stream


class Taps:
    """The table that a body's norms write to, ``[max_tokens, L + 1]`` float32.

    It is one, whose address never changes, so that CUDA graphs may be captured over it. Row i belongs to token i of the
    last forward, in the order of its batch.
    """

    def __init__(self, body: nn.Module, max_tokens: int):
        from void_ext import _library

        _library.load()
        layers = list(getattr(body, "layers", ()))
        norms = [getattr(layer, "input_layernorm", None) for layer in layers] + [getattr(body, "norm", None)]
        for index, norm in enumerate(norms):
            if not isinstance(getattr(norm, "weight", None), Tensor) or not hasattr(norm, "variance_epsilon"):
                raise ValueError(
                    f"body: expected layers with an input_layernorm, and a norm behind them, each an RMSNorm with "
                    f"weight and variance_epsilon; {type(body).__name__}'s norm {index} of {len(norms)} is {norm!r}"
                )
        if len(layers) < 1 or max_tokens < 1:
            raise ValueError(f"expected layers and tokens, got {len(layers)} layers and max_tokens={max_tokens}")
        weight: Any = getattr(norms[0], "weight")  # noqa: B009
        with torch.inference_mode(False):
            self.table = torch.zeros(max_tokens, len(norms), dtype=torch.float32, device=weight.device)
        self.norms: list[Any] = norms
        for column, norm in enumerate(self.norms):
            norm.forward = TapNorm(norm, self.table, column)

    def read(self, tokens: int) -> Tensor:
        """The norms ``[tokens, L + 1]`` of the last forward: a copy."""
        return self.table[:tokens].clone()

    def remove(self) -> None:
        """Put the norms' own forwards back. Graphs captured in between keep the taps."""
        for norm in self.norms:
            norm.__dict__.pop("forward", None)


def register() -> None:
    """vLLM's general plugin: with ``VOID_EXT_VLLM=trace``, the architectures above are built with taps on their norms.

    Safe to call more than once, as vLLM does.
    """
    wanted = os.environ.get("VOID_EXT_VLLM", "")
    if not wanted:
        return
    if wanted != "trace":
        raise ValueError(f"VOID_EXT_VLLM: expected 'trace' or nothing, got {wanted!r}")
    registry: Any = import_module("vllm").ModelRegistry
    for architecture in ARCHITECTURES:
        # By name: importing the class here could initialise CUDA in a process that forks.
        registry.register_model(architecture, f"{__name__}:{architecture}")


def __getattr__(name: str) -> Any:
    """The traced class of an architecture, made when vLLM asks for it."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    original: Any = getattr(import_module(ARCHITECTURES[name]), name)

    def construct(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        original.__init__(self, vllm_config=vllm_config, prefix=prefix)
        # Before vLLM compiles the forward, which it does once and without guards.
        self.void_ext_taps = Taps(self.model, vllm_config.scheduler_config.max_num_batched_tokens)

    traced = type(name, (original,), {"__init__": construct, "__module__": __name__})
    globals()[name] = traced
    return traced
