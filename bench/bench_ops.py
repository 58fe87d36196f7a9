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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.environment import describe
from bench.launches import WAYS, launched
from bench.op_cases import DTYPES, OF_FEW_ROWS, OPS, WITHOUT_DTYPE, Call, Case

WARMUPS = 2
# One buffer set for all calls: in a model's decode step the kernel ahead has just written the rows.
IN_L2 = "decode-in-L2"
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
JUST_WRITTEN = {"add_l2norm", "add_rms_norm", *OF_FEW_ROWS}  # what they read, in a model
TINY = [("decode", 1, 64), ("prefill", 16, 64)]


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
        if (shape[0] != IN_L2 or op in JUST_WRITTEN) and (shape[0] != "prefill" or op not in OF_FEW_ROWS)
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
