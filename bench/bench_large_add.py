"""What add_l2norm costs on the CPU beside torch.add, and beside what it replaces, at 4096 x 4096 by pairs in turns.

Each side allocates its own output, as in a model. A large output is mapped anew at every call, and touching it first
costs page faults; ``--keep-memory`` makes glibc keep freed memory, which leaves the arithmetic and the traffic. Prints
a table, writes JSON. A minute on two cores.

    python -m bench.bench_large_add [--pairs 200] [--threads 2] [--keep-memory] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from bench.environment import RESULTS
from bench.pairs import Ledger
from bench.report import load, tables

ROWS = WIDTH = 4096
ADD, ADD_THEN_NORM = "torch.add", "h = r + u; h.float().norm(dim=-1)"
# What add_l2norm's time may be of theirs. In float32 the second has nothing to widen, and no limit.
LIMITS = {ADD: 1.05, ADD_THEN_NORM: 1 / 3}
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**30)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_large_add", description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "large-add-cpu.json")
    options = parser.parse_args(arguments)
    if options.keep_memory and any(name not in os.environ for name in KEEP):  # read by malloc before Python starts
        command = [sys.executable, "-m", "bench.bench_large_add", *(arguments or sys.argv[1:])]
        os.execve(sys.executable, command, os.environ | KEEP)

    torch.set_num_threads(options.threads)
    op = torch.ops.void_ext.add_l2norm.default
    memory = "kept memory" if options.keep_memory else "fresh memory"
    ledger = Ledger(options.out, "overhead", "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        residual, update = (torch.randn(ROWS, WIDTH).to(dtype) for _ in range(2))
        norms = torch.empty(ROWS, 2)

        @torch.inference_mode()
        def subject(r=residual, u=update, n=norms):
            return op(r, u, n, 1)

        @torch.inference_mode()
        def add(r=residual, u=update):
            return torch.add(r, u)

        @torch.inference_mode()
        def add_then_norm(r=residual, u=update):
            h = r + u
            return h, h.float().norm(dim=-1)

        for base, name in ((add, ADD), (add_then_norm, ADD_THEN_NORM)):
            cell = {
                "model": "add_l2norm",
                "dtype": str(dtype).removeprefix("torch."),
                "work": f"{ROWS} x {WIDTH}, {memory}",
                "variant": f"against {name}",
                "threads": options.threads,
            }
            limited = name == ADD or dtype is torch.bfloat16
            ledger.measure(base, subject, cell, limit=LIMITS[name] if limited else None, pairs=options.pairs)
    print("\n" + tables(load(options.out)))
    return 0


if __name__ == "__main__":
    import void_ext.ops  # noqa: F401 - registers the op; after the environment was settled

    sys.exit(main())
