from __future__ import annotations

import torch
from torch import Tensor

from void_ext.ops._choice import chosen, verdict_alpha
from void_ext.ops._grad import refuse_grad, wants_grad
from void_ext.ops._tensors import check_tensors


def add_l2norm(
    residual: Tensor,
    update: Tensor,
    norms: Tensor,
    column: int,
    updates: Tensor | None = None,
    *,
    on: Tensor | None = None,
    alpha: float | None = None,
    executed: Tensor | None = None,
    active: Tensor | None = None,
    kept: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""A residual add that leaves the norm of its result behind.

    ``h = residual + update``; ``norms[i, column] = ||h_i||``; where ``updates`` is given,
    ``updates[i, column - 1] = ||h_i - residual_i||``, ``h`` as stored, i.e. rounded.

    Args:
        residual: ``(..., D)`` float32, float16 or bfloat16; ``rows`` is the product of the leading dimensions. Rows may
            be strided; what has no single row stride is copied first.
        update: like ``residual``: shape, dtype, device.
        norms: ``(R, C)`` float32, ``R >= rows``, written in place, in activation units. By row or by column, with gaps
            or without (a column that lies in one piece, ``torch.empty(C, R).t()``, is what a GPU writes fastest);
            beside ``active`` or ``kept``, columns neighbouring. Rows from ``rows`` on and other columns are left alone.
        column: ``0 <= column < C``; for a stream table, layer ``l`` writes column ``l + 1``.
        updates: ``(R', C')`` float32 of the same kind, or None; then ``1 <= column <= C'``.
        on: bool ``(rows,)`` or None. In rows that are off ``h = residual``, bit for bit, ``update`` is not read, and
            the update norm is 0.
        alpha: finite, >= 0, dimensionless; with ``active`` or ``kept``, the factor of the verdict on layer
            ``column - 1``: ``delta >= alpha * (max - min of the deltas before)`` over ``norms[i, :column + 1]``, as
            :func:`void_mask` has it. A row that is off was not active. Then ``column >= 1``.
        executed: bool ``(R, >= column - 1)`` or None: which of the layers before ran for the row; others are no part of
            its history.
        active: bool ``(rows,)``, written in place: the verdict, for a following op to read on the device. It may be
            ``on`` itself.
        kept: like ``residual``, written in place where the verdict is active: ``kept[i] = h[i]``.
        out: like ``residual``, rows of one stride, or None; written in place. It may be ``residual`` or ``update``.
    Returns:
        ``h``: ``out``, or a new contiguous tensor of ``residual``'s shape; bit for bit ``torch.add``'s (NaN payloads
        aside).
    Raises:
        TypeError: no tensor where one is needed; names the argument.
        ValueError: an argument of another shape, dtype, device or range, or memory written to that overlaps another
            argument's; names it, what was expected and what came.
            Nothing is written then. Also for a CUDA tensor in a build without CUDA.
        RuntimeError: grad mode is on, and a table requires grad, or any argument beside ``on`` or those after it; a
            CUDA launch failed.
    Numerics: squares and their sum in float32, of the rounded stream: above a norm of 1.8e19 the result is inf, squares
        below 1.4e-45 vanish. A row's norm has the same bits at any row count and, on a CPU, whatever the instruction
        set.
    Gradient: of ``h``, one and the same for ``residual`` and ``update``; the norms are detached. One plain add more.
    Cost: moves 6D + 4 bytes a row in bfloat16, as the plain add moves 6D; + 4 with ``updates``, - 2D a row
        that is off, + 4 column with a verdict, + 2D (from cache: + 4D) a row kept. One launch, no host
        sync, capturable.
    Source: arXiv 2505.14467. Differs from the paper's code in: the norm is kept in float32, not in the rows' dtype.
    """
    check_tensors("add_l2norm", "residual update norms", residual, update, norms)
    if wants_grad(residual, update) and not chosen(on, alpha, executed, active, kept, out):
        refuse_grad("add_l2norm", norms=norms, updates=updates)
        torch.ops.void_ext.add_l2norm.default(residual.detach(), update.detach(), norms, column, updates)
        return residual + update
    refuse_grad("add_l2norm", residual=residual, update=update, norms=norms, updates=updates, kept=kept, out=out)
    if chosen(on, alpha, executed, active, kept, out):
        factor = verdict_alpha("add_l2norm", alpha, active, kept)
        h = torch.empty_like(residual, memory_format=torch.contiguous_format) if out is None else out
        torch.ops.void_ext.add_l2norm.into(
            residual, update, norms, column, updates, on, factor, executed, active, kept, h
        )
        return h
    result: Tensor = torch.ops.void_ext.add_l2norm.default(residual, update, norms, column, updates)
    return result
