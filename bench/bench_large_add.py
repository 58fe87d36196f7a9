"""What the adds cost on the CPU beside what they replace, at 4096 x 4096, by pairs in turns. Prints and writes JSON.

add_l2norm, beside torch.add and the add with a norm: each side allocates its own output, as in a model. A large output
is mapped anew at every call, and touching it first costs page faults; ``--keep-memory`` makes glibc keep freed memory,
which leaves the arithmetic and the traffic.

add_rms_norm, into outputs of the caller's, beside a copy of as many bytes, Hugging Face's RMSNorm after an add, and
inductor's kernel of that: what the arithmetic leaves of the memory's bandwidth.

    python -m bench.bench_large_add [--op add_l2norm] [--pairs 200] [--threads 2] [--keep-memory] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.alternatives import EPS
from bench.environment import RESULTS
from bench.pairs import Ledger
from bench.report import load, tables

ROWS = WIDTH = 4096
ADD, ADD_THEN_NORM = "torch.add", "h = r + u; h.float().norm(dim=-1)"
# What add_l2norm's time may be of theirs. In float32 the second has nothing to widen, and no limit.
LIMITS = {ADD: 1.05, ADD_THEN_NORM: 1 / 3}
COPY, EAGER, COMPILED = "a copy of as many bytes", "add, HF RMSNorm", "the same, compiled"
# In bfloat16: 0.8 of the copy's bandwidth, an eighth of the eager time, no more than inductor's.
RMS_LIMITS = {COPY: 1 / 0.8, EAGER: 1 / 8, COMPILED: 1.0}
Work = Callable[[], object]
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**30)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_large_add", description=__doc__)
    parser.add_argument("--op", choices=["add_l2norm", "add_rms_norm"], default="add_l2norm")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "large-add-cpu.json")
    options = parser.parse_args(arguments)
    if options.keep_memory and any(name not in os.environ for name in KEEP):  # read by malloc before Python starts
        command = [sys.executable, "-m", "bench.bench_large_add", *(arguments or sys.argv[1:])]
        os.execve(sys.executable, command, os.environ | KEEP)

    torch.set_num_threads(options.threads)
    memory = "kept memory" if options.keep_memory else "fresh memory"
    work = f"{ROWS} x {WIDTH}, " + (memory if options.op == "add_l2norm" else "outputs given")
    ledger = Ledger(options.out, "overhead", "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for base, subject, against, limit in (_l2 if options.op == "add_l2norm" else _rms)(dtype):
            cell = {"model": options.op, "dtype": name, "work": work, "variant": f"against {against}"}
            cell["threads"] = options.threads
            ledger.measure(base, subject, cell, limit=limit, pairs=options.pairs)
    print("\n" + tables(load(options.out)))
    return 0


def _l2(dtype: torch.dtype) -> Iterator[tuple[Work, Work, str, float | None]]:
    """Base, subject, what the base is, the limit."""
    op = torch.ops.void_ext.add_l2norm.default
    residual, update = (torch.randn(ROWS, WIDTH).to(dtype) for _ in range(2))
    norms = torch.empty(ROWS, 2)

    @torch.inference_mode()
    def subject() -> object:
        return op(residual, update, norms, 1)

    @torch.inference_mode()
    def add() -> object:
        return torch.add(residual, update)

    @torch.inference_mode()
    def add_then_norm() -> object:
        h = residual + update
        return h, h.float().norm(dim=-1)

    yield add, subject, ADD, LIMITS[ADD]
    yield add_then_norm, subject, ADD_THEN_NORM, LIMITS[ADD_THEN_NORM] if dtype is torch.bfloat16 else None


def _rms(dtype: torch.dtype) -> Iterator[tuple[Work, Work, str, float | None]]:
    residual, update = (torch.randn(ROWS, WIDTH).to(dtype) for _ in range(2))
    weight, norms = torch.rand(WIDTH).to(dtype), torch.empty(ROWS, 2)
    out = torch.empty_like(residual), torch.empty_like(residual)
    source = torch.stack((residual, update))  # as many bytes as are read; as many are written
    target = torch.empty_like(source)

    @torch.inference_mode()
    def subject() -> object:
        return void_ext.add_rms_norm(residual, update, weight, EPS, norms, 1, out=out)

    @torch.inference_mode()
    def copy() -> object:
        return target.copy_(source)

    @torch.inference_mode()
    def eager() -> object:
        h = residual + update
        wide = h.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return h, weight * wide.to(dtype)

    @torch.inference_mode()
    @torch.compile
    def compiled() -> None:  # into the same outputs: fresh ones would cost their page faults
        h = residual + update
        wide = h.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        out[0].copy_(h)
        out[1].copy_(weight * wide.to(dtype))

    for base, name in ((copy, COPY), (eager, EAGER), (compiled, COMPILED)):
        yield base, subject, name, RMS_LIMITS[name] if dtype is torch.bfloat16 else None


if __name__ == "__main__":
    import void_ext.ops  # registers the ops; after the environment was settled

    sys.exit(main())
