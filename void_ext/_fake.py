"""Fake kernels: what an op returns, for torch.compile and meta tensors. They check what shapes alone can tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import SymBool, Tensor


def register() -> None:
    """Registers a fake kernel for every op; called once, after the op library is loaded."""
    for kernel in (
        add_l2norm,
        add_rms_norm,
        row_l2norm,
        void_mask,
        exit_select,
        keep_rows,
        compact,
        gather_rows,
        scatter_rows,
        streams_l2norm,
    ):
        torch.library.register_fake(f"void_ext::{kernel.__name__}", kernel)
    torch.library.register_fake("void_ext::add_l2norm.into", add_l2norm_into)
    torch.library.register_fake("void_ext::add_rms_norm.into", add_rms_norm_into)


def add_l2norm(residual: Tensor, update: Tensor, norms: Tensor, column: int, updates: Tensor | None = None) -> Tensor:
    _check_add("add_l2norm", residual, update, norms, updates)
    return residual.new_empty(residual.shape)


def add_rms_norm(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    norms: Tensor | None,
    column: int = 0,
    updates: Tensor | None = None,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_add("add_rms_norm", residual, update, norms, updates)
    _check_weight(weight, residual)
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def add_l2norm_into(
    residual: Tensor,
    update: Tensor,
    norms: Tensor,
    column: int,
    updates: Tensor | None,
    on: Tensor | None,
    alpha: float,
    executed: Tensor | None,
    active: Tensor | None,
    kept: Tensor | None,
    out: Tensor,
) -> None:
    _check_add("add_l2norm", residual, update, norms, updates)
    _check_choice("add_l2norm", residual, on, executed, active, kept)
    _check_shape("add_l2norm", "out", out, residual.shape, residual)


def add_rms_norm_into(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    norms: Tensor | None,
    column: int,
    updates: Tensor | None,
    zero_centered: bool,
    on: Tensor | None,
    alpha: float,
    executed: Tensor | None,
    active: Tensor | None,
    kept: Tensor | None,
    out: Tensor,
    normed: Tensor,
) -> None:
    _check_add("add_rms_norm", residual, update, norms, updates)
    _check_weight(weight, residual)
    _check_choice("add_rms_norm", residual, on, executed, active, kept)
    for name, target in (("out", out), ("normed", normed)):
        _check_shape("add_rms_norm", name, target, residual.shape, residual)


def row_l2norm(stream: Tensor, norms: Tensor, column: int) -> None:
    _check_table("row_l2norm", "norms", norms, stream)


def streams_l2norm(streams: Sequence[Tensor], norms: Tensor, column: int = 0) -> None:
    _check(len(streams) > 0, "streams_l2norm", "streams", "at least one tensor", norms)
    for place, stream in enumerate(streams):
        _check_shape("streams_l2norm", f"streams[{place}]", stream, streams[0].shape, streams[0])
    _check_table("streams_l2norm", "norms", norms, streams[0])


def void_mask(norms: Tensor, alpha: float, executed: Tensor | None = None) -> Tensor:
    _check_table("void_mask", "norms", norms, norms)
    if executed is not None:
        _check_kind("void_mask", "executed", executed, torch.bool, norms)
    return norms.new_empty((norms.shape[0], norms.shape[1] - 1), dtype=torch.bool)


def exit_select(kept: Tensor, stream: Tensor, norms: Tensor, layer: int, alpha: float) -> None:
    _check_shape("exit_select", "stream", stream, kept.shape, kept)
    _check_table("exit_select", "norms", norms, stream)


def keep_rows(residual: Tensor, update: Tensor, on: Tensor) -> Tensor:
    _check_shape("keep_rows", "update", update, residual.shape, residual)
    _check_vector("keep_rows", "on", on, torch.bool, residual)
    _check(on.shape[0] == residual.shape[:-1].numel(), "keep_rows", "on", "a flag for each row of residual", on)
    return residual.new_empty(residual.shape)


def compact(on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_vector("compact", "on", on, torch.bool, on)
    index, inverse = (on.new_empty(on.shape, dtype=torch.int64) for _ in range(2))
    return index, inverse, on.new_empty((1,), dtype=torch.int64)


def gather_rows(stream: Tensor, index: Tensor, count: Tensor, capacity: int) -> Tensor:
    _check_index("gather_rows", index, count, stream)
    return stream.new_empty((capacity, stream.shape[-1]))


def scatter_rows(stream: Tensor, rows: Tensor, index: Tensor, count: Tensor) -> None:
    _check_shape("scatter_rows", "rows", rows, (rows.shape[0], stream.shape[-1]), stream)
    _check_index("scatter_rows", index, count, stream)


def _check_index(op: str, index: Tensor, count: Tensor, like: Tensor) -> None:
    _check_vector(op, "index", index, torch.int64, like)
    _check_vector(op, "count", count, torch.int64, like)
    _check(count.shape[0] == 1, op, "count", "shape [1]", count)


def _check_vector(op: str, argument: str, tensor: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    _check_kind(op, argument, tensor, dtype, like)
    _check(tensor.dim() == 1, op, argument, "one dimension", tensor)


def _check_shape(op: str, argument: str, tensor: Tensor, expected: Sequence[int], like: Tensor) -> None:
    _check_kind(op, argument, tensor, like.dtype, like)
    expectation = f"shape {list(expected)}"
    _check(tensor.dim() == len(expected), op, argument, expectation, tensor)
    for got, wanted in zip(tensor.shape, expected, strict=True):
        _check(got == wanted, op, argument, expectation, tensor)


def _check_table(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    _check_kind(op, argument, tensor, torch.float32, like)
    _check(tensor.dim() == 2, op, argument, "two dimensions, [rows, columns]", tensor)


def _check_add(op: str, residual: Tensor, update: Tensor, norms: Tensor | None, updates: Tensor | None) -> None:
    _check_shape(op, "update", update, residual.shape, residual)
    for name, table in (("norms", norms), ("updates", updates)):
        if table is not None:
            _check_table(op, name, table, residual)


def _check_weight(weight: Tensor, residual: Tensor) -> None:
    _check(weight.shape == residual.shape[-1:], "add_rms_norm", "weight", f"shape {list(residual.shape[-1:])}", weight)
    if weight.dtype != torch.float32:
        _check_kind("add_rms_norm", "weight", weight, residual.dtype, residual)


def _check_choice(
    op: str,
    residual: Tensor,
    on: Tensor | None,
    executed: Tensor | None,
    active: Tensor | None,
    kept: Tensor | None,
) -> None:
    rows = residual.shape[:-1].numel()
    for name, flags in (("on", on), ("active", active)):
        if flags is not None:
            _check_vector(op, name, flags, torch.bool, residual)
            _check(flags.shape[0] == rows, op, name, "a flag for each row of residual", flags)
    if executed is not None:
        _check_kind(op, "executed", executed, torch.bool, residual)
        _check(executed.dim() == 2, op, "executed", "two dimensions, [rows, layers]", executed)
    if kept is not None:
        _check_shape(op, "kept", kept, residual.shape, residual)


def _check_kind(op: str, argument: str, tensor: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    # One meta tensor among others is enough to end up here: nothing would be computed, and nobody would notice.
    for expected, got in ((like.device, tensor.device), (dtype, tensor.dtype)):
        if expected != got:
            raise ValueError(f"void_ext::{op}: {argument}: expected {expected}, got {got}")


def _check(holds: bool | SymBool, op: str, argument: str, expected: str, tensor: Tensor) -> None:
    """ValueError in the words of the op's own checks; with symbolic shapes, a condition for run time."""
    torch._check_value(  # type: ignore[no-untyped-call]
        holds, lambda: f"void_ext::{op}: {argument}: expected {expected}, got shape {list(tensor.shape)}"
    )
