from __future__ import annotations

import torch
from torch import Tensor

from void_ext.ops._grad import refuse_grad
from void_ext.ops._tensors import check_tensors


def scatter_rows(stream: Tensor, rows: Tensor, index: Tensor, count: Tensor) -> None:
    r"""Packed rows back to where they came from: :func:`gather_rows` the other way round.

    ``stream[index[i]] = rows[i]`` for ``i < min(count, len(rows))``; every other row of ``stream`` stays as it is

    Args:
        stream: ``(..., D)`` float32, float16 or bfloat16, ``N`` rows, written in place; its rows have one stride and
            share nothing.
        rows: ``(R, D)``, ``R <= N``; dtype and device of ``stream``, memory apart from it. Rows from ``count`` on are
            never read. What has no single row stride is copied first.
        index: ``(M,)`` int64, ``M >= R``, as from :func:`compact`: below the count no row may come twice (which of the
            two would stay is not defined).
        count: ``(1,)`` int64.
    Raises:
        TypeError: no tensor where one is needed; names the argument.
        ValueError: an argument of another shape, dtype, device or range; names it, what was expected and what came.
            Nothing is written then. On a CPU also an index below the count that is no row of ``stream``, and a negative
            count; on CUDA, where they are not read back, such an index is skipped. Also for a CUDA tensor in a build
            without CUDA.
        RuntimeError: grad mode is on and a tensor requires grad; a CUDA launch failed.
    Numerics: a copy of bits.
    Cost: moves 4D + 8 bytes in bfloat16 for each row below the count. One launch, no host sync, capturable.
    Source: ``stream.flatten(0, -2)[index[:count]] = rows[:count]``, whose slices need the count on the host.
    """
    check_tensors("scatter_rows", "stream rows index count", stream, rows, index, count)
    refuse_grad("scatter_rows", stream=stream, rows=rows)
    torch.ops.void_ext.scatter_rows.default(stream, rows, index, count)
