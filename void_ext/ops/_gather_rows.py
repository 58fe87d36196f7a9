from __future__ import annotations

import torch
from torch import Tensor

from void_ext.ops._grad import refuse_grad
from void_ext.ops._tensors import check_tensors


def gather_rows(stream: Tensor, index: Tensor, count: Tensor, capacity: int) -> Tensor:
    r"""The rows of a stream that an index names, packed; how many there are may be known on the device alone.

    ``out[i] = stream[index[i]]`` for ``i < min(count, capacity)``

    Args:
        stream: ``(..., D)`` float32, float16 or bfloat16; ``N`` rows, the product of the leading dimensions. Rows may
            be strided; what has no single row stride is copied first.
        index: ``(M,)`` int64, ``M >= capacity``, as from :func:`compact`.
        count: ``(1,)`` int64.
        capacity: rows of the result, ``0 <= capacity <= N``.
    Returns:
        ``(capacity, D)``, new and contiguous. Rows from ``count`` on are not written: they hold whatever was in memory.
    Raises:
        TypeError: no tensor where one is needed; names the argument.
        ValueError: an argument of another shape, dtype, device or range; names it, what was expected and what came.
            On a CPU also an index below the count that is no row of ``stream``, and a negative count; on CUDA, where
            they are not read back, such an index is skipped, its row of the result left unwritten. Also for a CUDA
            tensor in a build without CUDA.
        RuntimeError: grad mode is on and ``stream`` requires grad; a CUDA launch failed.
    Numerics: a copy of bits.
    Cost: moves 4D + 8 bytes in bfloat16 for each row below the count. One launch, no host sync, capturable.
    Source: ``stream.flatten(0, -2)[index[:count]]``, whose slice needs the count on the host.
    """
    check_tensors("gather_rows", "stream index count", stream, index, count)
    refuse_grad("gather_rows", stream=stream)
    rows: Tensor = torch.ops.void_ext.gather_rows.default(stream, index, count, capacity)
    return rows
