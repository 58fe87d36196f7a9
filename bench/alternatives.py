"""add + RMSNorm as other libraries have it, none of which takes the norm along. Each is found at run time, or is not:
what a maker raises is noted in the result. Some write in place; none reads what another variant needs.

All take ``(residual, update, weight)`` and are called with eps = ``EPS``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6
Fused = Callable[[Tensor, Tensor, Tensor], object]


def torch_rms_norm() -> Fused:
    """torch.add and torch's own RMSNorm, a fused kernel on CUDA: two launches."""

    def call(residual: Tensor, update: Tensor, weight: Tensor) -> object:
        h = residual + update
        return h, torch.nn.functional.rms_norm(h, weight.shape, weight, EPS)

    return call


def compiled() -> Fused:
    """inductor's kernel of add and Hugging Face's RMSNorm."""

    @torch.compile
    def call(residual: Tensor, update: Tensor, weight: Tensor) -> object:
        h = residual + update
        wide = h.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return h, weight * wide.to(h.dtype)

    return call


def liger() -> Fused:
    function: Any = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction

    def call(residual: Tensor, update: Tensor, weight: Tensor) -> object:
        return function.apply(update, residual, weight, EPS, 0.0, "llama", False)

    return call


def flashinfer() -> Fused:
    function: Any = import_module("flashinfer.norm").fused_add_rmsnorm
    return lambda residual, update, weight: function(update, residual, weight, EPS)


def flashinfer_cute() -> Fused:
    function: Any = import_module("rivals_aot").flashinfer_cute_fused_add_rmsnorm
    return lambda residual, update, weight: function(update, residual, weight, EPS)


def quack() -> Fused:
    try:
        function: Any = import_module("quack.rmsnorm").rmsnorm_fwd
    except ModuleNotFoundError:
        compiled_ahead: Any = import_module("rivals_aot").quack_rmsnorm_fwd
        return lambda residual, update, weight: compiled_ahead(update, weight, residual, EPS)
    return lambda residual, update, weight: function(update, weight, residual=residual, eps=EPS)


#: name -> a maker of the call, and whether it runs on a CPU too
ADD_RMS_NORM: dict[str, tuple[Callable[[], Fused], bool]] = {
    "torch add, rms_norm": (torch_rms_norm, True),
    "compiled, no norm": (compiled, True),
    "Liger": (liger, False),
    "FlashInfer": (flashinfer, False),
    "FlashInfer, CuTe": (flashinfer_cute, False),
    "quack": (quack, False),
}
