from __future__ import annotations

import torch
from torch import Tensor

from void_ext.ops._grad import refuse_grad
from void_ext.ops._tensors import check_tensors


def void_mask(norms: Tensor, alpha: float, executed: Tensor | None = None) -> Tensor:
    r"""Which layers were active, for any ``alpha``, from the norms alone.

    ``active[t, l] = not (d[t, l] < alpha * (max_{j<l} d[t, j] - min_{j<l} d[t, j]))``,
    ``d = norms[:, 1:] - norms[:, :-1]``; the threshold is 0 where no layer comes before. Layers that did not run are
    left out of the ranges and are inactive.

    Args:
        norms: ``(tokens, layers + 1)`` float32, L2 norm of the residual stream before layer 0 and after each layer, in
            activation units. Row stride free.
        alpha: dimensionless, finite, >= 0, taken as float32.
        executed: ``(tokens, layers)`` bool, True where the layer ran; None: all ran.
    Returns:
        ``(tokens, layers)`` bool, True = active, contiguous, on the same device.
    Raises:
        TypeError: no tensor where one is needed; names the argument.
        ValueError: an argument of another shape, dtype, device or range; names it, what was expected and what came.
            Also for a CUDA tensor in a build without CUDA.
        RuntimeError: grad mode is on and norms require grad; a CUDA launch failed.
    Numerics: float32, no fused multiply-add: CPU and GPU agree bit for bit. Equality and NaN are active, and a NaN
        delta stays in the range of all later layers.
    Cost: reads 4(L + 1) bytes a token (+ L with ``executed``), writes L. One launch, no host sync, capturable.
    Source: arXiv 2505.14467. Differs from the paper's code in: layer 0's threshold is 0 instead of a range over the
        batch.
    """
    check_tensors("void_mask", "norms", norms)
    refuse_grad("void_mask", norms=norms)
    active: Tensor = torch.ops.void_ext.void_mask.default(norms, alpha, executed)
    return active
