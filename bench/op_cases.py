"""The ops to be measured, each with its arguments, the bytes it must move, and what a user would write without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import void_ext.ops  # noqa: F401 - registers torch.ops.void_ext
from bench.alternatives import ADD_RMS_NORM, EPS
from void_ext import reference

LAYERS = 32
COLUMN = 17
ALPHA = 0.8
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}  # in the order of their worth

Call = Callable[..., Any]


@dataclass
class Case:
    """One op at one shape: how to make its arguments, what it must move, and what it is compared with."""

    make: Callable[[], tuple[Tensor, ...]]
    op: Call
    bytes: int
    alternatives: dict[str, Call] = field(default_factory=dict)
    launches: bool = False  # whether it can be launched in other ways


# --- the ops and their alternatives; all variants of a case take the same arguments ---


def _add_l2norm(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def add(residual: Tensor, update: Tensor, norms: Tensor) -> Tensor:
        return residual + update

    def add_then_norm(residual: Tensor, update: Tensor, norms: Tensor) -> Tensor:
        h = residual + update
        norms[:, COLUMN] = h.float().norm(dim=-1)
        return h

    op = torch.ops.void_ext.add_l2norm.default
    return Case(
        make=lambda: (_rows(rows, width, dtype, device), _rows(rows, width, dtype, device), _table(rows, device)),
        op=lambda residual, update, norms: op(residual, update, norms, COLUMN),
        bytes=rows * (3 * width * dtype.itemsize + 4),
        alternatives={"torch.add": add, "add, then norm": add_then_norm, "compiled": torch.compile(add_then_norm)},
        launches=True,
    )


def _add_rms_norm(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def eager(residual: Tensor, update: Tensor, weight: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + update
        wide = h.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return h, weight * wide.to(dtype)

    def eager_with_norm(residual: Tensor, update: Tensor, weight: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        h, normed = eager(residual, update, weight, norms)
        norms[:, COLUMN] = h.float().norm(dim=-1)
        return h, normed

    def others(make: Call) -> Call:
        found: list[Call] = []

        def call(residual: Tensor, update: Tensor, weight: Tensor, norms: Tensor) -> object:
            if not found:
                found.append(make())
            return found[0](residual, update, weight)

        return call

    op = torch.ops.void_ext.add_rms_norm.default
    elsewhere = {name: others(make) for name, (make, anywhere) in ADD_RMS_NORM.items() if anywhere or device == "cuda"}
    return Case(
        make=lambda: (
            _rows(rows, width, dtype, device),
            _rows(rows, width, dtype, device),
            torch.rand(width, device=device).to(dtype),
            _table(rows, device),
        ),
        op=lambda residual, update, weight, norms: op(residual, update, weight, EPS, norms, COLUMN),
        bytes=rows * (4 * width * dtype.itemsize + 4) + width * dtype.itemsize,
        alternatives={
            "add, HF RMSNorm": eager,
            "add, HF RMSNorm, norm": eager_with_norm,
            "compiled": torch.compile(eager_with_norm),
            "detection off": lambda residual, update, weight, norms: op(residual, update, weight, EPS, None),
            **elsewhere,
        },
        launches=True,
    )


def _row_l2norm(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def upcast(stream: Tensor, norms: Tensor) -> None:
        norms[:, COLUMN] = stream.float().norm(dim=-1)

    def vector_norm(stream: Tensor, norms: Tensor) -> None:
        norms[:, COLUMN] = torch.linalg.vector_norm(stream, dim=-1, dtype=torch.float32)

    op = torch.ops.void_ext.row_l2norm.default
    return Case(
        make=lambda: (_rows(rows, width, dtype, device), _table(rows, device)),
        op=lambda stream, norms: op(stream, norms, COLUMN),
        bytes=rows * (width * dtype.itemsize + 4),
        alternatives={"float, then norm": upcast, "vector_norm": vector_norm, "compiled": torch.compile(upcast)},
    )


def _streams_l2norm(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def stacked(norms: Tensor, *streams: Tensor) -> None:
        norms.copy_(torch.linalg.vector_norm(torch.stack(streams), dim=-1, dtype=torch.float32).t())

    def one_by_one(norms: Tensor, *streams: Tensor) -> None:
        for column, stream in enumerate(streams):
            row_l2norm(stream, norms, column)

    op = torch.ops.void_ext.streams_l2norm.default
    row_l2norm = torch.ops.void_ext.row_l2norm.default
    return Case(
        make=lambda: (_table(rows, device), *(_rows(rows, width, dtype, device) for _ in range(LAYERS + 1))),
        op=lambda norms, *streams: op(streams, norms),
        bytes=(LAYERS + 1) * rows * (width * dtype.itemsize + 4),
        alternatives={"stack, then vector_norm": stacked, "compiled": torch.compile(stacked), "row_l2norm": one_by_one},
    )


def _adds_of_a_step(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    """Not one op: the adds that close the layers of a decode step, traced as a patched model traces few rows."""

    def adds(residual: Tensor, update: Tensor, norms: Tensor) -> list[Tensor]:
        streams = [residual]
        for _ in range(LAYERS):
            streams.append(streams[-1] + update)
        return streams

    def traced(residual: Tensor, update: Tensor, norms: Tensor) -> list[Tensor]:
        streams = adds(residual, update, norms)
        streams_l2norm(streams, norms)
        return streams

    def fused(residual: Tensor, update: Tensor, norms: Tensor) -> list[Tensor]:
        row_l2norm(residual, norms, 0)
        streams = [residual]
        for layer in range(LAYERS):
            streams.append(add_l2norm(streams[-1], update, norms, layer + 1))
        return streams

    add_l2norm = torch.ops.void_ext.add_l2norm.default
    row_l2norm = torch.ops.void_ext.row_l2norm.default
    streams_l2norm = torch.ops.void_ext.streams_l2norm.default
    return Case(
        make=lambda: (_rows(rows, width, dtype, device), _rows(rows, width, dtype, device), _table(rows, device)),
        op=traced,
        bytes=rows * (4 * LAYERS + 1) * width * dtype.itemsize + rows * 4 * (LAYERS + 1),
        alternatives={"detection off": adds, "add_l2norm": fused},
    )


def _void_mask(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def cumulative(norms: Tensor) -> Tensor:
        deltas = norms[:, 1:] - norms[:, :-1]
        spread = deltas.cummax(-1).values - deltas.cummin(-1).values
        threshold = torch.cat([spread.new_zeros(rows, 1), ALPHA * spread[:, :-1]], dim=-1)
        return ~(deltas < threshold)

    op = torch.ops.void_ext.void_mask.default
    return Case(
        make=lambda: (_norms(rows, device),),
        op=lambda norms: op(norms, ALPHA),
        bytes=rows * (4 * (LAYERS + 1) + LAYERS),
        alternatives={"cummax, cummin": cumulative, "compiled": torch.compile(cumulative)},
    )


def _exit_select(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def masked(kept: Tensor, stream: Tensor, norms: Tensor) -> None:
        deltas = norms[:, 1 : COLUMN + 2] - norms[:, : COLUMN + 1]
        before = deltas[:, :-1]
        active = ~(deltas[:, -1] < ALPHA * (before.amax(-1) - before.amin(-1)))
        kept.copy_(torch.where(active[:, None], stream, kept))

    op = torch.ops.void_ext.exit_select.default
    # Bytes: the norms, and a read and a write of the rows that are active; half of them are, by the norms made here.
    return Case(
        make=lambda: (
            _rows(rows, width, dtype, device),
            _rows(rows, width, dtype, device),
            _half_active_norms(rows, device),
        ),
        op=lambda kept, stream, norms: op(kept, stream, norms, COLUMN, ALPHA),
        bytes=rows * 4 * (COLUMN + 2) + (rows + 1) // 2 * 2 * width * dtype.itemsize,
        alternatives={"mask, then where": masked, "compiled": torch.compile(masked)},
    )


# Half of the rows are on in what follows, every second one.


def _keep_rows(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def where(residual: Tensor, update: Tensor, on: Tensor) -> Tensor:
        return torch.where(on[:, None], residual + update, residual)

    def masked(residual: Tensor, update: Tensor, on: Tensor) -> Tensor:
        return residual + update * on[:, None]

    on = (rows + 1) // 2
    return Case(
        make=lambda: (_rows(rows, width, dtype, device), _rows(rows, width, dtype, device), _half_on(rows, device)),
        op=torch.ops.void_ext.keep_rows.default,
        bytes=rows + (2 * rows + on) * width * dtype.itemsize,
        alternatives={"add, then where": where, "compiled": torch.compile(where), "times the mask": masked},
    )


def _compact(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def sort(on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.argsort(on.to(torch.uint8), descending=True, stable=True)
        return index, torch.argsort(index), on.sum().view(1)

    waiting = {"nonzero": torch.nonzero} if device == "cpu" else {}  # waits for the device: no graph can hold it
    return Case(
        make=lambda: (_half_on(rows, device),),
        op=torch.ops.void_ext.compact.default,
        bytes=17 * rows + 8,
        alternatives={"stable sort": sort, **waiting},
    )


def _gather_rows(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def index_select(stream: Tensor, index: Tensor, count: Tensor) -> Tensor:
        return stream.index_select(0, index[:on])

    op = torch.ops.void_ext.gather_rows.default
    on = (rows + 1) // 2
    return Case(
        make=lambda: (_rows(rows, width, dtype, device), *_half_index(rows, device)),
        op=lambda stream, index, count: op(stream, index, count, on),
        bytes=on * (2 * width * dtype.itemsize + 8) + 8,
        alternatives={"index_select": index_select},
    )


def _scatter_rows(rows: int, width: int, dtype: torch.dtype, device: str) -> Case:
    def index_copy(stream: Tensor, packed: Tensor, index: Tensor, count: Tensor) -> None:
        stream.index_copy_(0, index[:on], packed)

    on = (rows + 1) // 2
    return Case(
        make=lambda: (
            _rows(rows, width, dtype, device),
            _rows(on, width, dtype, device),
            *_half_index(rows, device),
        ),
        op=torch.ops.void_ext.scatter_rows.default,
        bytes=on * (2 * width * dtype.itemsize + 8) + 8,
        alternatives={"index_copy_": index_copy},
    )


OPS: dict[str, Callable[[int, int, torch.dtype, str], Case]] = {
    "add_l2norm": _add_l2norm,
    "add_rms_norm": _add_rms_norm,
    "row_l2norm": _row_l2norm,
    "streams_l2norm": _streams_l2norm,
    "adds_of_a_step": _adds_of_a_step,
    "void_mask": _void_mask,
    "exit_select": _exit_select,
    "keep_rows": _keep_rows,
    "compact": _compact,
    "gather_rows": _gather_rows,
    "scatter_rows": _scatter_rows,
}
WITHOUT_DTYPE = {"void_mask", "compact"}
OF_FEW_ROWS = {"streams_l2norm", "adds_of_a_step"}


def _rows(rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(rows, width, device=device).to(dtype)


def _norms(rows: int, device: str) -> Tensor:
    return torch.randn(rows, LAYERS + 1, device=device).abs_().cumsum(-1)


def _table(rows: int, device: str) -> Tensor:
    """Where one column is written to: in the layout that a patched model's table has on that device."""
    return torch.zeros(LAYERS + 1, rows, device=device).t() if device == "cuda" else _norms(rows, device)


def _half_active_norms(rows: int, device: str) -> Tensor:
    norms = torch.arange(LAYERS + 1.0, device=device).repeat(rows, 1)
    norms[1::2, COLUMN + 1 :] -= 10.0
    return norms


def _half_on(rows: int, device: str) -> Tensor:
    return torch.arange(rows, device=device) % 2 == 0


def _half_index(rows: int, device: str) -> tuple[Tensor, Tensor]:
    index, _, count = reference.compact(_half_on(rows, device))
    return index, count
