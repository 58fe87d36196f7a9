from __future__ import annotations

import torch
from torch import Tensor

from void_ext.ops._choice import chosen, verdict_alpha
from void_ext.ops._grad import refuse_grad, wants_grad
from void_ext.ops._tensors import check_tensors
from void_ext.reference._ops import rms_norm


def add_rms_norm(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    norms: Tensor | None,
    column: int = 0,
    updates: Tensor | None = None,
    zero_centered: bool = False,
    *,
    on: Tensor | None = None,
    alpha: float | None = None,
    executed: Tensor | None = None,
    active: Tensor | None = None,
    kept: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A residual add and the RMSNorm that follows it: one sum of squares serves both the norm and its recording.

    ``h = residual + update``; ``normed = round(h * rsqrt(sum(h^2) / D + eps)) * weight``, or, ``zero_centered``,
    ``round(h * rsqrt(sum(h^2) / D + eps) * (1 + weight))``;
    ``norms[i, column] = ||h_i||``; where given, ``updates[i, column - 1] = ||h_i - residual_i||``.

    Args:
        residual: ``(..., D)`` float32, float16 or bfloat16; ``rows`` is the product of the leading dimensions. Rows may
            be strided; what has no single row stride is copied first.
        update: like ``residual``: shape, dtype, device.
        weight: ``(D,)``, dtype of ``residual`` or float32, its device, contiguous.
        eps: dimensionless, finite, >= 0, taken as float32.
        norms: ``(R, C)`` float32, ``R >= rows``, written in place, in activation units; see :func:`add_l2norm`. None:
            nothing is recorded.
        column: ``0 <= column < C``; without ``norms``, the one after ``updates``' column.
        updates: ``(R', C')`` float32 or None; then ``1 <= column <= C'``.
        zero_centered: the weight is stored less one and the product made in float32: transformers' GemmaRMSNorm.
        on, alpha, executed, active, kept: as in :func:`add_l2norm`; ``normed`` is that of ``h``, off or on.
        out: two tensors like ``residual``, for ``h`` and ``normed``, rows of one stride each, or None; written in
            place. The first may be ``residual`` or ``update``.
    Returns:
        ``(h, normed)``: ``out``, or new contiguous tensors of ``residual``'s shape; in ``residual``'s dtype, also where
        the weight is float32 (transformers' LlamaRMSNorm would give float32 there). ``h`` is bit for bit
        ``torch.add``'s.
    Raises:
        TypeError: no tensor where one is needed; names the argument.
        ValueError: an argument of another shape, dtype, device or range, or memory written to that overlaps another
            argument's; names it, what was expected and what came. Nothing is written then. Also for a CUDA tensor in a
            build without CUDA.
        RuntimeError: grad mode is on, and a table requires grad, or any argument beside ``on`` or those after it; a
            CUDA launch failed.
    Numerics: the roundings of Hugging Face's LlamaRMSNorm or GemmaRMSNorm, on the rounded ``h``. The sum runs in
        another order than torch's, so before the weight a value may fall to the other neighbour (1 ulp): in 1e-5 of
        the elements in bfloat16, 1e-4 in float16; float32 rows differ in the last bits.
    Gradient: of ``h`` and ``normed``, for ``residual``, ``update`` and ``weight``; the norms are detached. Both are
        then made once more by plain torch: ``normed`` may differ in its last bit from the one without a gradient.
    Cost: moves 8D + 4 bytes a row in bfloat16; + 4 with ``updates``. One launch, no host sync, capturable.
    Source: arXiv 2505.14467 for the norm; transformers' LlamaRMSNorm for the rounding order.
    """
    check_tensors("add_rms_norm", "residual update weight", residual, update, weight)
    h, normed = (None, None) if out is None else out
    if wants_grad(residual, update, weight) and not chosen(on, alpha, executed, active, kept, h):
        refuse_grad("add_rms_norm", norms=norms, updates=updates)
        torch.ops.void_ext.add_rms_norm.default(
            residual.detach(), update.detach(), weight.detach(), eps, norms, column, updates, zero_centered
        )
        h = residual + update
        return h, rms_norm(h, weight, eps, zero_centered)
    refuse_grad(
        "add_rms_norm",
        residual=residual,
        update=update,
        weight=weight,
        norms=norms,
        updates=updates,
        kept=kept,
        out=h,
        normed=normed,
    )
    if chosen(on, alpha, executed, active, kept, h):
        factor = verdict_alpha("add_rms_norm", alpha, active, kept)
        if h is None or normed is None:
            h, normed = (torch.empty_like(residual, memory_format=torch.contiguous_format) for _ in range(2))
        torch.ops.void_ext.add_rms_norm.into(
            residual,
            update,
            weight,
            eps,
            norms,
            column,
            updates,
            zero_centered,
            on,
            factor,
            executed,
            active,
            kept,
            h,
            normed,
        )
        return h, normed
    result: tuple[Tensor, Tensor] = torch.ops.void_ext.add_rms_norm.default(
        residual, update, weight, eps, norms, column, updates, zero_centered
    )
    return result
