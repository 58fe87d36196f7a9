"""The one table of float tolerances. Every entry says where its number comes from; an exception is a new entry.

Masks, copies, the stream an op returns and the logits of a traced model have no entry: they are compared bitwise
(``assert_bits_equal``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """``|actual - expected| <= atol + rtol * |expected|``, and why."""

    rtol: float
    atol: float
    reason: str


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _norm(dtype: torch.dtype, width: int) -> Tolerance:
    del dtype  # norms are float32 whatever the rows are
    return Tolerance(
        rtol=_eps(torch.float32) * (2 + math.sqrt(width)),
        atol=1e-30,
        reason="a float32 sum of `width` squares in any order errs like a random walk, sqrt(width) half ulps; one "
        "element left out of 16,384 still shows. atol: squares below 1e-38 may vanish",
    )


def _rms_norm(dtype: torch.dtype, width: int) -> Tolerance:
    if dtype == torch.float32:
        return Tolerance(_norm(dtype, width).rtol + 4 * _eps(dtype), 1e-30, "the norm's own, rsqrt and two products")
    return Tolerance(2 * _eps(dtype), torch.finfo(dtype).tiny, "one flip at each of the two roundings to the dtype")


def _logits(dtype: torch.dtype, width: int) -> Tolerance:
    del width
    atol = {torch.float32: 2e-5, torch.float16: 1.2e-2, torch.bfloat16: 5e-2}[dtype]
    return Tolerance(
        rtol=4 * _eps(dtype),
        atol=atol,
        reason="a random Llama of 8 layers, width 256, logits of size 1, with its RMSNorms summed in another order was "
        "off by at most 3.8e-6, 5.9e-3, 2.3e-2 (float32, float16, bfloat16); at least twice that",
    )


def _compiled(dtype: torch.dtype, width: int) -> Tolerance:
    del dtype, width
    return Tolerance(
        rtol=0.1,
        atol=0.0,
        reason="of the root mean square distance to eager: compiled as it is, a model in bfloat16 is off by roundings "
        "that inductor leaves out, patched by fewer of them. Over four inputs each, six tiny Llamas patched were off "
        "by 0.98 to 1.05 of what they were unpatched, four tiny GPT-2s by 0.70 to 0.77; twice the excess",
    )


def _batched_norm(dtype: torch.dtype, width: int) -> Tolerance:
    del width
    if dtype != torch.float32:
        raise ValueError(f"dtype: expected float32, in which a row in a batch is close to the row alone, got {dtype}")
    return Tolerance(
        rtol=4e-6,
        atol=1e-30,
        reason="matrix products of other shapes sum in another order; norms of 564 tokens of a random Llama of 6 "
        "layers, width 32, were off by at most 6.8e-7 of themselves between batches of 1 and 5; some six times that",
    )


def _oracle(dtype: torch.dtype, width: int) -> Tolerance:
    del width
    if dtype != torch.float32:
        raise ValueError(f"dtype: expected float32, in which a model is close to the oracle, got {dtype}")
    return Tolerance(
        rtol=2e-4,
        atol=2e-4,
        reason="float32 products of other shapes sum in another order, six layers deep",
    )


_TABLE: dict[str, Callable[[torch.dtype, int], Tolerance]] = {
    "norm": _norm,
    "rms_norm": _rms_norm,
    "logits": _logits,
    "compiled": _compiled,
    "batched_norm": _batched_norm,
    "oracle": _oracle,
}


def tolerance(quantity: str, dtype: torch.dtype, width: int = 1) -> Tolerance:
    """The tolerance for a quantity.

    Args:
        quantity: ``"norm"`` (row and update norms against float64), ``"rms_norm"`` (the normed output of
            ``add_rms_norm``), ``"logits"`` (a model against itself by another route), ``"compiled"`` (how far a
            compiled model is from its eager self, patched against unpatched), ``"batched_norm"`` (a token's norms in a
            batch of another shape; float32 alone), ``"oracle"`` (a tiny model under a plan against the plain
            interpreter of plans; float32 alone).
        dtype: of the rows or logits compared: float32, float16 or bfloat16.
        width: length of the reduction, where one is behind the quantity.
    Raises:
        ValueError: unknown quantity or dtype, width below 0.
    """
    if quantity not in _TABLE:
        raise ValueError(f"quantity: expected one of {sorted(_TABLE)}, got {quantity!r}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    if width < 0:
        raise ValueError(f"width: expected at least 0, got {width}")
    return _TABLE[quantity](dtype, width)
