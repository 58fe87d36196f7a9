"""What skipping gives beside the model that physically lacks the layers: decode and prefill, by layers skipped.

The ideal of a plan that skips n layers is a model without them, on the same weights; where layers are projected (K and
V for the cache alone), it is that model and its projections run apart, one after the other. `0 skipped` compares an
empty plan with the unpatched model; `dense` compares the unpatched model with the ideal, which is what there is to
gain. CPU: SmolLM2-135M. GPU: the paper's three configurations with random weights. Cells
run in the order of their worth, results are written after each, and a second call measures what is missing.

    python -m bench.bench_skip [--device cpu] [--threads 2] [--pairs 50] [--curve-pairs 8] [--limit 1500] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import void_ext
from bench import models
from bench.bench_e2e import CONFIGS, random_model
from bench.environment import RESULTS
from bench.pairs import Ledger, earlier
from bench.report import load, tables

STEPS = {"cpu": 4, "cuda": 1}  # of decode a run
PREFILL = 512
LIMIT = 1.03  # of the ideal's time
BATCHES = (1, 8, 32)
MODELS = {"cpu": ["SmolLM2-135M"], "cuda": ["Llama-3-8B", "Qwen2.5-7B", "Mistral-7B"]}
Work = Callable[[], object]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_skip", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=["SmolLM2-135M", *CONFIGS], default=None)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pairs", type=int, default=50, help="of the cells with a limit")
    parser.add_argument("--curve-pairs", type=int, default=8, help="of the other shares and batches")
    parser.add_argument("--cell-seconds", type=float, default=180.0)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which no new cell is begun")
    parser.add_argument(
        "--only", choices=["limits", "gain", "curve"], help="cells with a limit, what to gain, the others"
    )
    parser.add_argument("--work", choices=["decode", "prefill"], help="cells of one kind of work alone")
    parser.add_argument("--variant", help='cells of one variant alone, such as "0 of 30 skipped"')
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    names = options.models or MODELS[options.device]
    out = options.out or RESULTS / f"skip-{'gpu' if options.device == 'cuda' else 'cpu'}.json"
    end = time.monotonic() + options.limit
    torch.set_num_threads(options.threads)
    ledger = Ledger(out, "skip", options.device, earlier(out, options.device))
    complete = True
    for name in names:
        cells = [cell for cell in plan_cells(name, options) if not ledger.has(**cell)]
        cells = [cell for cell in cells if options.work is None or options.work in cell["work"]]
        cells = [cell for cell in cells if options.variant in (None, cell["variant"])]
        if cells and time.monotonic() < end:
            bench = Bench(name, options)
            while cells and time.monotonic() < end:
                bench.measure(ledger, cells.pop(0))
        complete &= not cells
    if ledger.rows:
        ledger.save()
        print("\n" + tables(load(out)))
    if not complete:
        print("bench_skip: the time is over before all cells were measured; run it again for the rest")
    return 0 if complete else 3


def layers_of(name: str) -> int:
    return 30 if name == "SmolLM2-135M" else int(CONFIGS[name][1]["num_hidden_layers"])


def plan_cells(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is measured, the cells with a limit first."""
    layers = layers_of(name)
    most = round(0.3 * layers)
    shares = [n for n in dict.fromkeys((0, round(0.1 * layers), most, layers // 2)) if n < layers]

    def cell(work: str, batch: int, skipped: int, action: str) -> dict[str, Any]:
        threads = options.threads if options.device == "cpu" else None
        return {
            "model": name,
            "dtype": "float32" if name == "SmolLM2-135M" else "bfloat16",
            "work": f"{work}, batch {batch}"
            if work == "decode"
            else f"{prompt_length(batch)}-token prefill, batch {batch}",
            "variant": f"{skipped} of {layers} {action}",
            "threads": threads,
        }

    def limited() -> Iterator[dict[str, Any]]:
        for work in ("decode", "prefill"):
            yield cell(work, 1, most, "skipped")
        for work in ("decode", "prefill"):
            yield cell(work, 1, most, "projected")
        for work in ("decode", "prefill"):
            yield cell(work, 1, 0, "skipped")

    ends = list(limited())
    if options.only in (None, "limits"):
        yield from ends
    if options.only in (None, "gain"):
        for work in ("decode", "prefill"):
            yield cell(work, 1, most, "dense")
    if options.only in (None, "curve"):
        for batch in BATCHES:
            for work in ("decode", "prefill"):
                for skipped in shares:
                    found = cell(work, batch, skipped, "skipped")
                    if found not in ends:
                        yield found


class Bench:
    """One model, what lacks its layers, and what skips them, all on the same weights."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.options = options
        self.steps = STEPS[options.device]
        self.synchronize = torch.cuda.synchronize if options.device == "cuda" else None
        if name == "SmolLM2-135M":
            from void_ext.models import smollm2

            self.model, _ = smollm2(dtype=torch.float32, device=options.device)
        else:
            torch.manual_seed(0)
            self.model = random_model(name, options.device)
        self.layers = layers_of(name)
        limited = argparse.Namespace(**{**vars(options), "only": "limits"})
        self.limited = {(cell["work"], cell["variant"]) for cell in plan_cells(name, limited)}

    def measure(self, ledger: Ledger, cell: dict[str, Any]) -> None:
        work, batch = cell["work"].split(", batch ")
        skipped, action = int(cell["variant"].split()[0]), cell["variant"].rsplit(" ", 1)[1]
        chosen = spread(self.layers, skipped)
        work = work.rsplit(" ", 1)[-1].rsplit("-", 1)[-1]
        length = prompt_length(int(batch)) if work == "prefill" else models.PROMPT
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(100, min(40_000, self.model.config.vocab_size), (int(batch), length), generator=generator)
        ids = ids.to(self.options.device)

        subject = models.twin(self.model)
        patched = action != "dense"
        if action == "projected":
            phases = ("prompt",) if work == "prefill" else ("prompt", "response")
            plan = projecting(self.layers, chosen, phases)
        else:
            plan = void_ext.VoidPlan.from_layers(subject, skip=chosen)
        if patched:
            void_ext.patch(subject, mode="skip", plan=plan)
        ideal = self.unit(models.lacking(self.model, chosen), work, ids)
        if action == "projected":
            ideal = in_turn(ideal, models.projections(self.model, chosen, work, ids, self.steps))
        limited = (cell["work"], cell["variant"]) in self.limited
        tokens = int(batch) * (length if work == "prefill" else self.steps)
        ledger.measure(
            ideal,
            self.unit(subject, work, ids),
            cell,
            limit=LIMIT if limited else None,
            extra={"tokens": tokens, "skipped": skipped, "layers": self.layers},
            pairs=self.options.pairs if limited or not patched else self.options.curve_pairs,
            max_seconds=self.options.cell_seconds,
            synchronize=self.synchronize,
        )

    def unit(self, subject: torch.nn.Module, work: str, ids: torch.Tensor) -> Work:
        return models.prefill(subject, ids) if work == "prefill" else models.decode(subject, ids, self.steps)


def prompt_length(batch: int) -> int:
    """Batches get shorter prompts: 512 tokens are what keeps a CPU busy, and a GPU too."""
    return PREFILL if batch == 1 else PREFILL // 8


def spread(layers: int, count: int) -> list[int]:
    """``count`` layers spread evenly between the first two and the last."""
    inner = list(range(2, layers - 1)) or list(range(layers))
    return [inner[(2 * i + 1) * len(inner) // (2 * count)] for i in range(count)]


def projecting(layers: int, chosen: list[int], phases: tuple[str, ...]) -> void_ext.VoidPlan:
    run, project, skip = void_ext.Action.RUN, void_ext.Action.PROJECT, void_ext.Action.SKIP
    some = void_ext.PhasePlan(
        tuple(project if layer in chosen else run for layer in range(layers)),
        tuple(skip if layer in chosen else run for layer in range(layers)),
    )
    dense = void_ext.VoidPlan.dense(layers).prompt
    response = some if "response" in phases else dense
    return void_ext.VoidPlan(prompt=some, response=response, fingerprint=None, source="benchmark")


def in_turn(*work: Work) -> Work:
    def both() -> None:
        for part in work:
            part()

    return both


if __name__ == "__main__":
    sys.exit(main())
