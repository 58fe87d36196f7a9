from __future__ import annotations

import torch
from torch import Tensor

from void_ext.ops._tensors import check_tensors


def compact(on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Which rows are on, as what :func:`gather_rows` and :func:`scatter_rows` take, without the host learning it.

    ``index[:count]``: the ``i`` with ``on[i]``, ascending; ``index[count:] = -1``;
    ``inverse[i]``: the ``j`` with ``index[j] == i`` where ``on[i]``, else ``-1``; ``count = sum(on)``

    Args:
        on: ``(N,)`` bool, any stride: a column of a table will do.
    Returns:
        ``(index, inverse, count)``: int64 ``(N,)``, ``(N,)`` and ``(1,)``, on ``on``'s device.
    Raises:
        TypeError: no tensor where one is needed; names the argument.
        ValueError: ``on`` is not bool or not one-dimensional; says what came. Also for a CUDA tensor in a build without
            CUDA.
        RuntimeError: a CUDA launch failed.
    Numerics: integers; the order of the rows is kept, the same at every call (no atomics).
    Cost: reads N bytes, writes 16N + 8. One launch, no host sync, capturable. On CUDA one block does it all: made for
        the rows of one forward call, up to some 10,000; millions are right, but slow.
    Source: a stable stream compaction, as cub::DeviceSelect::Flagged does it for large inputs.
    """
    check_tensors("compact", "on", on)
    index: Tensor
    inverse: Tensor
    count: Tensor
    index, inverse, count = torch.ops.void_ext.compact.default(on)
    return index, inverse, count
