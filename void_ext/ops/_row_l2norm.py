from __future__ import annotations

import torch
from torch import Tensor

from void_ext.ops._grad import refuse_grad
from void_ext.ops._tensors import check_tensors


def row_l2norm(stream: Tensor, norms: Tensor, column: int) -> None:
    r"""The norm of every row of an existing stream, for models whose residual add cannot be reached.

    ``norms[i, column] = ||stream_i||``

    Args:
        stream: ``(..., D)`` float32, float16 or bfloat16; ``rows`` is the product of the leading dimensions. Rows may
            be strided; what has no single row stride is copied first.
        norms: ``(R, C)`` float32, ``R >= rows``, written in place, in activation units. By row or by
            column, with gaps or without. Rows from ``rows`` on and other columns are left alone.
        column: ``0 <= column < C``.
    Raises:
        TypeError: no tensor where one is needed; names the argument.
        ValueError: an argument of another shape, dtype, device or range; names it, what was expected and what came.
            Nothing is written then. Also for a CUDA tensor in a build without CUDA.
        RuntimeError: grad mode is on and an argument requires grad; a CUDA launch failed.
    Numerics: float32; the same bits as ``add_l2norm`` gives for the same row, at any row count.
    Cost: reads 2D bytes a row in bfloat16, writes 4. One launch, no host sync, capturable.
    Source: arXiv 2505.14467. Differs from the paper's code in: the norm is kept in float32, not in the rows' dtype.
    """
    check_tensors("row_l2norm", "stream norms", stream, norms)
    refuse_grad("row_l2norm", stream=stream, norms=norms)
    torch.ops.void_ext.row_l2norm.default(stream, norms, column)
