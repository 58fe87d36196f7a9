from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from void_ext.ops._grad import refuse_grad
from void_ext.ops._tensors import check_tensors


def streams_l2norm(streams: Sequence[Tensor], norms: Tensor, column: int = 0) -> None:
    r"""The norms of several streams at once: of those that few rows left behind in a forward, say.

    ``norms[i, column + j] = ||streams[j]_i||``

    Args:
        streams: at least one tensor ``(..., D)`` float32, float16 or bfloat16, all of one shape and dtype; ``rows`` is
            the product of the leading dimensions. Rows may be strided; what has no single row stride is copied first.
        norms: ``(R, C)`` float32, ``R >= rows``, ``C >= column + len(streams)``, written in place, in activation
            units. By row or by column, with gaps or without. Rows from ``rows`` on and other columns are left alone.
        column: that of the first stream.
    Raises:
        TypeError: no list of tensors, or no tensor, where one is needed; names the argument.
        ValueError: an argument of another shape, dtype, device or range; names it, what was expected and what came.
            Nothing is written then. Also for a CUDA tensor in a build without CUDA.
        RuntimeError: grad mode is on and an argument requires grad; a CUDA launch failed.
    Numerics: float32; the same bits as ``row_l2norm`` gives for the same row.
    Cost: reads 2D bytes a row and stream in bfloat16, writes 4. One launch for every 128 streams, no host sync,
        capturable.
    Source: arXiv 2505.14467. Differs from the paper's code in: the norm is kept in float32, not in the rows' dtype.
    """
    if not isinstance(streams, (list, tuple)):
        raise TypeError(f"void_ext::streams_l2norm: streams: expected a list of tensors, got {type(streams).__name__}")
    tensors = {"norms": norms, **{f"streams[{i}]": stream for i, stream in enumerate(streams)}}
    check_tensors("streams_l2norm", " ".join(tensors), *tensors.values())
    refuse_grad("streams_l2norm", **tensors)
    torch.ops.void_ext.streams_l2norm.default(streams, norms, column)
