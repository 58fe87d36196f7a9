"""Fake kernels: what an op returns, for torch.compile and meta tensors. They check what shapes alone can tell."""

from __future__ import annotations

import torch
from torch import Tensor


def register() -> None:
    """Registers a fake kernel for every op; called once, after the op library is loaded."""
    for kernel in (add_l2norm, add_rms_norm, row_l2norm, void_mask, exit_select):
        torch.library.register_fake(f"void_ext::{kernel.__name__}", kernel)


def add_l2norm(residual: Tensor, update: Tensor, norms: Tensor, column: int, updates: Tensor | None = None) -> Tensor:
    _check_add("add_l2norm", residual, update, norms, column)
    return residual.new_empty(residual.shape)


def add_rms_norm(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    norms: Tensor,
    column: int,
    updates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_add("add_rms_norm", residual, update, norms, column)
    torch._check_value(weight.dim() == 1, lambda: _message("add_rms_norm", "weight", "one dimension", weight.shape))
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def row_l2norm(stream: Tensor, norms: Tensor, column: int) -> None:
    _check_table("row_l2norm", norms)


def void_mask(norms: Tensor, alpha: float, executed: Tensor | None = None) -> Tensor:
    _check_table("void_mask", norms)
    return norms.new_empty((norms.shape[0], norms.shape[1] - 1), dtype=torch.bool)


def exit_select(kept: Tensor, stream: Tensor, norms: Tensor, layer: int, alpha: float) -> None:
    _check_table("exit_select", norms)


def _check_add(op: str, residual: Tensor, update: Tensor, norms: Tensor, column: int) -> None:
    torch._check_value(
        residual.dim() == update.dim(),
        lambda: _message(op, "update", f"shape {list(residual.shape)} like residual", list(update.shape)),
    )
    for wanted, got in zip(residual.shape, update.shape, strict=True):
        torch._check_value(
            wanted == got,
            lambda: _message(op, "update", f"shape {list(residual.shape)} like residual", list(update.shape)),
        )
    _check_table(op, norms)


def _check_table(op: str, norms: Tensor) -> None:
    torch._check_value(norms.dim() == 2, lambda: _message(op, "norms", "two dimensions, [rows, columns]", norms.shape))


def _message(op: str, argument: str, expected: str, got: object) -> str:
    return f"void_ext::{op}: {argument}: expected {expected}, got {got}"
