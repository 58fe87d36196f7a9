"""add + RMSNorm of quack and of FlashInfer's CuTe-DSL path, compiled ahead by tools/gpu/compile_rivals.py.

Needs tvm_ffi, torch for CUDA 13, and contiguous rows (2-D, one dtype, a width in widths(), below 2**31 numbers). The
libraries' Python wrappers are not called: times of kernels and graphs are theirs, those of eager calls are not.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch  # before any library: it brings libcudart
import tvm_ffi
from torch import Tensor

HERE = Path(__file__).resolve().parent


@functools.cache
def kernel(rival: str, dtype: torch.dtype, width: int) -> Any:
    return tvm_ffi.load_module(str(HERE / rival / f"{dtype}_{width}.so".removeprefix("torch.")))["func"]


def widths(rival: str = "quack") -> list[int]:
    return sorted(int(path.stem.removeprefix("bfloat16_")) for path in (HERE / rival).glob("bfloat16_*.so"))


def quack_rmsnorm_into(x: Tensor, weight: Tensor, residual: Tensor, out: Tensor, added: Tensor, eps: float) -> None:
    """added = x + residual; out = norm(added) * weight."""
    kernel("quack", x.dtype, x.size(-1))(x, weight, None, residual, out, added, None, None, eps)


def quack_rmsnorm_fwd(x: Tensor, weight: Tensor, residual: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, None]:
    """As quack.rmsnorm.rmsnorm_fwd with a residual: norm(x + residual) * weight, x + residual, no rstd."""
    out, added = torch.empty_like(x), torch.empty_like(x)
    quack_rmsnorm_into(x, weight, residual, out, added, eps)
    return out, added, None


def flashinfer_cute_fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    """As flashinfer.norm.fused_add_rmsnorm, in place: residual += input; input = norm(residual) * weight."""
    kernel("flashinfer_cute", input.dtype, input.size(-1))(input, residual, weight, input.size(0), eps)
