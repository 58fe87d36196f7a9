"""Every op against what a user would write without it, on cold caches, and for few rows on CUDA with the rows in L2 too
(pytest-benchmark, one row a case).

A *round* calls a variant once on each of several buffer sets that nothing has touched since the caches were flushed, so
each call reads and writes memory. All variants take their rounds in turns, so that they meet the same machine. On CUDA
a round is one graph replay (launches, no Python), timed by two events on the device while the host is ahead of it;
pytest-benchmark's own columns are the host's time and hold a launch and a wait beside it: read `extra_info`.
`copy` moves as many bytes as the op has to: half of them read, half written; the best of two ways to copy.

Beside what others have, add_l2norm and add_rms_norm are compared with themselves: without detection ("detection off"),
and on CUDA launched in other ways (bench/launches.py).

    python -m pytest bench/bench_ops.py --benchmark-json=ops.json     python -m bench.report ops.json
"""

from __future__ import annotations

import fcntl
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import void_ext.ops  # noqa: F401 - registers torch.ops.void_ext
from bench.alternatives import ADD_RMS_NORM, EPS
from bench.environment import describe
from bench.launches import WAYS, launched
from void_ext import reference

LAYERS = 32
COLUMN = 17
ALPHA = 0.8
WARMUPS = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IN_L2 = (
    "decode-in-L2"  # one buffer set for all calls: in a model's decode step the kernel ahead has just written the rows
)
# (kind, rows, width): SmolLM2-135M 576, Qwen2.5-7B 3584, Llama-3-8B and Mistral-7B 4096, Llama-3-70B 8192; decode is a
# batch of single tokens, prefill a prompt.
SHAPES = {
    "cpu": [("decode", 1, 576), ("decode", 8, 4096), ("prefill", 512, 576), ("prefill", 512, 4096)],
    "cuda": [
        ("decode", 1, 4096),
        ("decode", 8, 4096),
        ("decode", 64, 4096),
        ("decode", 64, 3584),
        ("decode", 64, 8192),
        ("decode", 64, 576),
        *(
            (IN_L2, rows, width)
            for rows, width in ((1, 4096), (8, 4096), (64, 4096), (64, 3584), (64, 8192), (64, 576))
        ),
        ("prefill", 512, 3584),
        ("prefill", 4096, 576),
        ("prefill", 4096, 3584),
        ("prefill", 4096, 4096),
        ("prefill", 4096, 8192),
        ("prefill", 16384, 4096),
    ],
}
# (fewest, most) calls a round, and the bytes after which more are not needed.
CALLS = {"cpu": (2, 32, 64 << 20), "cuda": (4, 128, 256 << 20)}
# What is written and read before a round, so that the caches hold nothing of it: on CUDA five times the L2, and long
# enough to enqueue the round behind it.
FLUSH = {"cpu": 96 << 20, "cuda": 256 << 20}
TINY = [("decode", 1, 64), ("prefill", 16, 64)]

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
    "void_mask": _void_mask,
    "exit_select": _exit_select,
    "keep_rows": _keep_rows,
    "compact": _compact,
    "gather_rows": _gather_rows,
    "scatter_rows": _scatter_rows,
}
IN_EVERY_LAYER = {"add_l2norm", "add_rms_norm"}
WITHOUT_DTYPE = {"void_mask", "compact"}


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


# --- measuring ---


class Rounds:
    """One variant, called once on each buffer set; a graph of those calls on CUDA. Keeps the seconds of its rounds."""

    def __init__(self, call: Call, sets: list[tuple[Tensor, ...]], device: str, pool: Any = None):
        self._call, self._sets, self._graph = call, sets, None
        self.seconds: list[float] = []
        self._calls()  # warms up
        if device == "cuda":
            self._ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._calls()

    def _calls(self) -> None:
        # Results are held: given back, their memory would be the next call's, which would find it in the caches.
        held = [self._call(*arguments) for arguments in self._sets]
        del held

    def run(self) -> None:
        if self._graph is None:
            start = time.perf_counter()
            self._calls()
            self.seconds.append(time.perf_counter() - start)
            return
        first, last = self._ends
        first.record()
        self._graph.replay()
        last.record()
        last.synchronize()
        self.seconds.append(first.elapsed_time(last) / 1e3)


def _copies(size: int, sets: int, again: bool, device: str, pool: Any) -> dict[str, Rounds]:
    count = max(1, size // 8)

    def pair() -> tuple[Tensor, Tensor]:
        return torch.rand(count, device=device), torch.empty(count, device=device)

    pairs = [pair()] * sets if again else [pair() for _ in range(sets)]
    return {
        "copy_": Rounds(lambda source, target: target.copy_(source), pairs, device, pool),
        "neg": Rounds(lambda source, target: torch.neg(source, out=target), pairs, device, pool),
    }


@contextmanager
def _alone(lock: str | None) -> Iterator[None]:
    """Holds the file's lock: of several processes that compile at once, one at a time measures. The others may try out
    what they have compiled meanwhile: one call of each alternative."""
    if lock is None:
        yield
        return
    with open(lock, "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _parameters(config: pytest.Config) -> list[Any]:
    device = config.getoption("--device")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    shapes = TINY if config.getoption("--shapes") == "tiny" else SHAPES[device]
    return [
        pytest.param(op, dtype, *shape, device, id=f"{op}-{dtype}-{shape[0]}-{shape[1]}x{shape[2]}-{device}")
        for op in OPS
        for dtype in (["float32"] if op in WITHOUT_DTYPE else DTYPES)
        for shape in shapes
        if shape[0] != IN_L2 or op in IN_EVERY_LAYER
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("op,dtype,kind,rows,width,device", _parameters(metafunc.config))


@torch.no_grad()
def test_op(benchmark, pytestconfig, op: str, dtype: str, kind: str, rows: int, width: int, device: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    case = OPS[op](rows, width, DTYPES[dtype], device)
    failed = _prepare(case)
    with _alone(pytestconfig.getoption("--lock")):
        if device == "cuda":
            torch.cuda.empty_cache()
        facts = {"op": op, "kind": kind, "rows": rows, "width": width, "dtype": dtype}
        _measure(benchmark, case, facts, device, failed, pytestconfig.getoption("--rounds"))


def _prepare(case: Case) -> dict[str, str]:
    """Compiles what has to be compiled, and takes out of the case what cannot run here (no compiler for inductor, say):
    name -> why, which is a result too."""
    failed: dict[str, str] = {}
    arguments = case.make()
    for name, call in list(case.alternatives.items()):
        try:
            call(*arguments)
        except Exception as error:
            failed[name] = _why(error)
            del case.alternatives[name]
    if arguments[0].is_cuda:
        torch.cuda.synchronize()
    return failed


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


def _measure(
    benchmark: Any, case: Case, facts: dict[str, Any], device: str, failed: dict[str, str], rounds: int
) -> None:
    least, most, spread = CALLS[device]
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None  # no two graphs run at once
    count = max(least, min(most, spread // case.bytes))
    again = facts["kind"] == IN_L2
    sets = [case.make()] * count if again else [case.make() for _ in range(count)]
    subject = Rounds(case.op, sets, device, pool)
    others: dict[str, Rounds] = {}
    for name, call in case.alternatives.items():
        try:
            others[name] = Rounds(call, sets, device, pool)
        except Exception as error:  # a graph cannot hold it
            failed[name] = _why(error)
    for way in WAYS if case.launches and device == "cuda" else ():
        with launched(way):  # a graph keeps it
            others[way] = Rounds(case.op, sets, device, pool)
    others |= _copies(case.bytes, len(sets), again, device, pool)
    flusher = torch.zeros(FLUSH[device] // 4, device=device)

    def flush() -> None:
        # Writing takes the caches from whoever ran before; behind the reads hardly anything of it is left to be written
        # back in a round's time.
        flusher.add_(1.0)
        flusher.sum()

    def before() -> None:
        for variant in others.values():
            flush()
            variant.run()
        flush()

    benchmark.pedantic(subject.run, setup=before, rounds=rounds, warmup_rounds=WARMUPS)
    if benchmark.disabled:
        return
    seconds = {name: statistics.median(variant.seconds[WARMUPS:]) / len(sets) for name, variant in others.items()}
    own = statistics.median(subject.seconds[WARMUPS:]) / len(sets)
    spread_of = statistics.quantiles(subject.seconds[WARMUPS:], n=10)
    copy = min(seconds.pop("copy_"), seconds.pop("neg"))
    benchmark.extra_info.update(
        **facts,
        calls_per_round=len(sets),
        seconds=own,
        percentiles={f"p{10 * share}": spread_of[share - 1] / len(sets) for share in (2, 5, 8)},
        bytes=case.bytes,
        gbps=case.bytes / own / 1e9,
        copy_gbps=case.bytes / copy / 1e9,
        share_of_copy=copy / own,
        alternatives={name: {"seconds": taken, "ratio": taken / own} for name, taken in seconds.items()},
        unavailable=failed,
        **describe(device),
    )
