"""Traced against unpatched models of 7 and 8 billion random weights (bfloat16) on a GPU.

Decode steps after a prompt of 128 tokens (eager, and one captured step replayed with a static cache) at batch 1, 8 and
64, and prefill of 512 tokens a row at batch 1 and 8; compiled decode steps where asked for (`--works`). The weights are
random, for time alone: no layer is skipped, so what they say does not matter. Cells run in the order of their worth,
each until it has its pairs or for `--cell-seconds`, until `--limit`; a second call measures the cells that are missing.

    python -m bench.bench_e2e [--limit 480] [--out FILE]     (--models tiny --device cpu: a look at whether all runs)
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import models
from bench.environment import RESULTS
from bench.pairs import Ledger, earlier
from bench.report import load, tables

STEPS = 1  # a run: 5 ms and more, so that the wait at its end is nothing beside it
PROMPT = 128
PREFILL = 512
WORKS = {"graphed decode": (1, 8, 64), "decode": (1, 8, 64), "prefill": (1, 8), "compiled decode": (1, 8)}
UNASKED = ["graphed decode", "decode", "prefill"]  # a model of this size takes minutes to compile
GRAPHED_LIMIT = 1.01  # of the unpatched model's time, where Python has no part in it
# model_type and the published configurations' sizes; "tiny" only for a look.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3-8B": (
        "llama",
        {
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "vocab_size": 128256},
        },
    ),
    "Qwen2.5-7B": (
        "qwen2",
        {
            **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
            **{"num_key_value_heads": 4, "vocab_size": 152064},
        },
    ),
    "Mistral-7B": (
        "mistral",
        {
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None},
        },
    ),
    "tiny": (
        "llama",
        {
            **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "vocab_size": 256},
        },
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_e2e", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=list(CONFIGS), default=[name for name in CONFIGS if name != "tiny"]
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--cell-seconds", type=float, default=6.0, help="a cell stops here, with the pairs it has")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which no new cell is begun")
    parser.add_argument("--variants", nargs="+", choices=models.VARIANTS, default=models.VARIANTS)
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=UNASKED)
    parser.add_argument("--out", type=Path, default=RESULTS / "e2e-gpu.json")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.limit

    ledger = Ledger(options.out, "e2e", options.device, earlier(options.out, options.device))
    complete = True
    for name in options.models:
        cells = [cell for cell in _cells(name, options.works) if cell["variant"] in options.variants]
        cells = [cell for cell in cells if not ledger.has(**cell)]
        if cells and time.monotonic() < end:
            cells = _measure(ledger, name, cells, options, end)
        complete &= not cells
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if ledger.rows:
        ledger.save()
        print("\n" + tables(load(options.out)))
    if not complete:
        print("bench_e2e: the time is over before all cells were measured; run it again for the rest")
    return 0 if complete else 3


def _cells(name: str, works: list[str]) -> Iterator[dict[str, Any]]:
    def cell(work: str, batch: int, variant: str) -> dict[str, Any]:
        return {"model": name, "dtype": "bfloat16", "work": f"{work}, batch {batch}", "variant": variant}

    for work in works:
        for batch, variant in itertools.product(WORKS[work], ("fuse=norm", "fuse=add")):
            yield cell(work, batch, variant)
    for work in works:
        if work in ("decode", "prefill"):  # plain hooks keep what a graph's pool takes back
            yield cell(work, 1, "plain hooks")


def _measure(
    ledger: Ledger, name: str, cells: list[dict[str, Any]], options: argparse.Namespace, end: float
) -> list[dict[str, Any]]:
    """Measures until the time is over; the cells left."""
    torch.manual_seed(0)
    model = random_model(name, options.device)
    traced: dict[str, torch.nn.Module] = {}
    synchronize = torch.cuda.synchronize if options.device == "cuda" else None
    while cells and time.monotonic() < end:
        cell = cells.pop(0)
        variant = cell["variant"]
        if variant not in traced:
            traced[variant] = models.variant(model, variant)
        work, batch = cell["work"].split(", batch ")
        length = PREFILL if work == "prefill" else PROMPT
        ids = torch.randint(0, model.config.vocab_size, (int(batch), length), device=options.device)

        def unit(subject: torch.nn.Module, work: str = work, ids: torch.Tensor = ids):
            if work == "prefill":
                return models.prefill(subject, ids)
            steps = {"decode": models.decode, "graphed decode": models.graphed_decode}
            return steps.get(work, models.compiled_decode)(subject, ids, STEPS)

        how = {"pairs": options.pairs, "max_seconds": options.cell_seconds, "synchronize": synchronize}
        limit = GRAPHED_LIMIT if work == "graphed decode" else None
        try:
            sides = unit(model), unit(traced[variant])
        except Exception as error:  # no memory for this batch, or a step that cannot be captured: a result too
            ledger.miss(cell, error)
            continue
        extra = None
        if cell["work"] == "decode, batch 1":
            counts = [models.launches(side) for side in sides]
            extra = {"launches": [None if count is None else count / STEPS for count in counts]}
        ledger.measure(*sides, cell, limit=limit, extra=extra, **how)
    return cells


def random_model(name: str, device: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = CONFIGS[name]
    config = AutoConfig.for_model(kind, **sizes, max_position_embeddings=8192)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


if __name__ == "__main__":
    sys.exit(main())
