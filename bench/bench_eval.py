"""What the void statistics add to lm-eval's own time: its requests with the watched model against plain lm-eval.

Both answer the same requests of the task capitals (or write answers to its questions) in turns in one process, with an
A/A control: the watched one is patched with mode="trace" and counts voids, the other is lm-eval's HFLM over a second
set of modules with the same weights.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import void_ext
from bench import models
from bench.environment import RESULTS
from bench.pairs import Ledger
from bench.report import load, tables

LIMIT = 1.02
KINDS = ("loglikelihood", "generate_until")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_eval", description=__doc__)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--documents", type=int, default=4, help="per unit that is timed")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "eval-cpu.json")
    options = parser.parse_args(arguments)

    from void_ext.evaluate.harness import quiet
    from void_ext.models import smollm2

    model, tokenizer = smollm2(dtype=torch.float32, device="cpu")
    ledger = Ledger(options.out, "overhead", "cpu")
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for kind in KINDS:
            if options.only in (None, kind):
                with quiet():
                    watched_model = models.twin(model)
                    base, subject = units(kind, model, watched_model, tokenizer, options)
                    cell = {
                        "model": "SmolLM2-135M",
                        "dtype": "float32",
                        "work": f"lm-eval {kind}, {options.documents} documents, batch {options.batch_size}",
                        "variant": "eval",
                        "threads": threads,
                    }
                    # The harness's prints go to stderr in here, and so does the ledger's line.
                    ledger.measure(base, subject, cell, limit=LIMIT, pairs=options.pairs)
    print("\n" + tables(load(options.out)))
    return 0


def units(
    kind: str, model: Any, watched_model: Any, tokenizer: Any, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], object]]:
    """One answering of the same requests by plain lm-eval, and by the watched model with a tally of its own.

    Patching itself is left out: it comes once per task and mode, whatever the number of requests.
    """
    from lm_eval.models.huggingface import HFLM

    from void_ext.evaluate.harness import WatchedLM
    from void_ext.evaluate.tally import Tally

    requests = make_requests(kind, options.documents)
    plain = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=options.batch_size, backend="causal")
    watched = WatchedLM(watched_model, tokenizer, options.batch_size)
    handle = void_ext.patch(watched_model)

    def base() -> None:
        getattr(plain, kind)(requests, disable_tqdm=True)

    def subject() -> None:
        tally = Tally((0.8,))
        with watched.watching(handle, tally):
            getattr(watched, kind)(requests)
            tally.result()

    return base, subject


def make_requests(kind: str, documents: int) -> list[Any]:
    from lm_eval.api.instance import Instance

    from void_ext.evaluate import load_tasks
    from void_ext.testing.tasks import CAPITALS, write_capitals

    with tempfile.TemporaryDirectory() as folder:
        task = load_tasks([CAPITALS], [write_capitals(folder)])[CAPITALS].task
        task.build_all_requests(limit=documents, rank=0, world_size=1)
    if kind == "loglikelihood":
        return list(task.instances)
    contexts = dict.fromkeys(instance.args[0] for instance in task.instances)
    settings = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}
    return [
        Instance(kind, {}, (context, dict(settings)), index, (CAPITALS, index, 1))
        for index, context in enumerate(contexts)
    ]


if __name__ == "__main__":
    sys.exit(main())
