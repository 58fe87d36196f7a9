"""What tracing costs on SmolLM2-135M on the CPU: traced against unpatched, in turns, with an A/A control.

Decode at batch 1 and prefill of 512 tokens; one thread and all threads; fuse=add, fuse=norm and, for comparison, the
hooks one would write without this library. Prints a table, writes JSON after every cell. Some 30 minutes on two cores.
`--only "compiled decode"` is a decode step under torch.compile, which takes a minute a model to compile.

    python -m bench.bench_overhead [--pairs 50] [--dtype float32] [--threads 1 2] [--only decode] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from bench import models
from bench.environment import RESULTS
from bench.pairs import Ledger
from bench.report import load, tables

STEPS = 4
PREFILL = 512


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_overhead", description=__doc__)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--only", choices=["decode", "prefill", "compiled decode"])
    parser.add_argument("--variants", nargs="+", choices=models.VARIANTS, default=list(models.VARIANTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead-cpu.json")
    options = parser.parse_args(arguments)

    from void_ext.models import smollm2

    model, _ = smollm2(dtype=getattr(torch, options.dtype), device="cpu")
    prompt = torch.randint(100, 40_000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    ledger = Ledger(options.out, "overhead", "cpu")
    traced = {name: models.variant(model, name) for name in options.variants}
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for work in ("decode", "prefill") if options.only is None else (options.only,):

            def unit(subject: torch.nn.Module, work: str = work):
                if work == "decode":
                    return models.decode(subject, prompt[:, : models.PROMPT], STEPS)
                if work == "compiled decode":
                    return models.compiled_decode(subject, prompt[:, : models.PROMPT], STEPS)
                return models.prefill(subject, prompt)

            words = f"{work}, {PREFILL if work == 'prefill' else STEPS} tokens"
            for name, subject in traced.items():
                cell = {
                    "model": "SmolLM2-135M",
                    "dtype": options.dtype,
                    "work": words,
                    "variant": name,
                    "threads": threads,
                }
                ledger.measure(unit(model), unit(subject), cell, pairs=options.pairs)
    print("\n" + tables(load(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
