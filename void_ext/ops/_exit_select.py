from __future__ import annotations

import torch
from torch import Tensor

from void_ext.ops._grad import refuse_grad
from void_ext.ops._tensors import check_tensors


def exit_select(kept: Tensor, stream: Tensor, norms: Tensor, layer: int, alpha: float) -> None:
    r"""Keeps a layer's output in the rows for which it was active.

    Called after each layer, it leaves in ``kept`` the output of every row's last active one:
    ``kept[i] = stream[i]`` where ``void_mask(norms, alpha)[i, layer]``, untouched elsewhere

    Args:
        kept: ``(..., D)`` float32, float16 or bfloat16, written in place; its rows have one stride and share nothing.
        stream: like ``kept``: shape, dtype, device; the very same rows, or memory apart from them. What has no single
            row stride is copied first.
        norms: ``(R, C)`` float32, ``R >= rows``; only columns ``0`` to ``layer + 1`` are read.
        layer: ``0 <= layer < C - 1``.
        alpha: dimensionless, finite, >= 0, taken as float32.
    Raises:
        TypeError: no tensor where one is needed; names the argument.
        ValueError: an argument of another shape, dtype, device or range; names it, what was expected and what came.
            Nothing is written then. Also for a CUDA tensor in a build without CUDA.
        RuntimeError: grad mode is on and an argument requires grad; a CUDA launch failed.
    Numerics: a copy of bits, never a product with a mask (0 * inf is NaN).
    Cost: reads 4(layer + 2) bytes a row, and 2D in and 2D out in bfloat16 for an active one. One launch, no host sync,
        capturable.
    Source: the published code of arXiv 2505.14467, which multiplies by the mask.
    """
    check_tensors("exit_select", "kept stream norms", kept, stream, norms)
    refuse_grad("exit_select", kept=kept, stream=stream, norms=norms)
    torch.ops.void_ext.exit_select.default(kept, stream, norms, layer, alpha)
