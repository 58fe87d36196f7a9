from __future__ import annotations

import torch
from torch import Tensor

from void_ext.ops._grad import refuse_grad


def add_l2norm(residual: Tensor, update: Tensor, norms: Tensor, column: int, updates: Tensor | None = None) -> Tensor:
    r"""A residual add that leaves the norm of its result behind.

    ``h = residual + update``; ``norms[i, column] = ||h_i||``; where ``updates`` is given,
    ``updates[i, column - 1] = ||h_i - residual_i||``, ``h`` as stored, i.e. rounded.

    Args:
        residual: ``(..., D)`` float32, float16 or bfloat16; ``rows`` is the product of the leading dimensions. Rows may
            be strided; what has no single row stride is copied first.
        update: like ``residual``: shape, dtype, device.
        norms: ``(R, C)`` float32, ``R >= rows``, written in place, in activation units. Row stride free, columns
            neighbouring. Rows from ``rows`` on and other columns are left alone.
        column: ``0 <= column < C``; for a stream table, layer ``l`` writes column ``l + 1``.
        updates: ``(R', C')`` float32 of the same kind, or None; then ``1 <= column <= C'``.
    Returns:
        ``h``: a new contiguous tensor of ``residual``'s shape, bit for bit ``torch.add``'s (NaN payloads aside).
    Raises:
        ValueError: an argument of another shape, dtype, device or range; names it, what was expected and what came.
            Nothing is written then. Also for a CUDA tensor in a build without CUDA.
        RuntimeError: grad mode is on and an argument requires grad; a CUDA launch failed.
    Numerics: squares and their sum in float32, of the rounded stream: above a norm of 1.8e19 the result is inf, squares
        below 1.4e-45 vanish. A row's norm has the same bits at any row count and, on a CPU, whatever the instruction
        set.
    Cost: moves 6D + 4 bytes a row in bfloat16, as the plain add moves 6D; + 4 with ``updates``. One launch, no host
        sync, capturable.
    Source: arXiv 2505.14467. Differs from the paper's code in: the norm is kept in float32, not in the rows' dtype.
    """
    refuse_grad("add_l2norm", residual=residual, update=update, norms=norms, updates=updates)
    h: Tensor = torch.ops.void_ext.add_l2norm.default(residual, update, norms, column, updates)
    return h
