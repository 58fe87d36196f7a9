"""What skipping costs and gives on SmolLM2-135M: perplexity of held-out text, agreement with the dense model, speed.

Plans are ranked on one part of the text and judged on another: by voids (the signed delta, as in the paper), |delta|,
relative update and cosine, beside the last layers and random ones. The text comes with Python (`pydoc_data.topics`) and
is named by its hash. Tokens/s are of decode steps at batch 1, in turns with the dense model.

    python -m bench.bench_quality [--budgets 1 2 3 6 9] [--pairs 6] [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import void_ext
from bench import models
from bench.environment import RESULTS, describe, write_json
from void_ext import timing

WINDOW = 512
WINDOWS = 4  # of each part
SIGNALS = ("delta", "abs_delta", "relative_update", "cosine")
STEPS = 4


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_quality", description=__doc__)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 3, 6, 9])
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument(
        "--pairs", type=int, default=6, help="of timing each plan against the dense model; 0: not timed"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    from void_ext.models import smollm2

    model, tokenizer = smollm2(dtype=torch.float32, device="cpu")
    text = prose()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, : 2 * WINDOWS * WINDOW]
    calibration, held_out = ids.view(2, WINDOWS, WINDOW)
    facts = {
        "text": "pydoc_data.topics, sorted by name, joined by blank lines",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": {"calibration": calibration.numel(), "held out": held_out.numel()},
        "alpha": options.alpha,
    }
    dense, best = judge(model, held_out, None)
    rows: list[dict[str, object]] = []
    for method, budget, plan in plans(model, calibration, options):
        subject = models.twin(model)
        void_ext.patch(subject, mode="skip", plan=plan)
        perplexity, agreement = judge(subject, held_out, best)
        speed = measure(model, subject, held_out[:1, : models.PROMPT], options.pairs)
        skipped = [layer for layer in range(plan.layers) if plan.response.mlp[layer] != void_ext.Action.RUN]
        halves = [layer for layer in range(plan.layers) if plan.response.attention[layer] != void_ext.Action.RUN]
        rows.append(
            {
                "method": method,
                "budget": budget,
                "mlp off": skipped,
                "attention off": halves,
                "perplexity": perplexity,
                "agreement": agreement,
                **speed,
            }
        )
        print(line(rows[-1]), flush=True)
        write_json(options.out, {"kind": "quality", "environment": describe(), **facts, "dense": dense, "rows": rows})
    print("\n" + table(facts, dense, rows))
    return 0


def measure(model: nn.Module, subject: nn.Module, prompt: Tensor, pairs: int) -> dict[str, object]:
    """The dense model's time of a decode step over the subject's; nothing for no pairs."""
    if not pairs:
        return {}
    speed = timing.compare(models.decode(model, prompt, STEPS), models.decode(subject, prompt, STEPS), pairs=pairs)
    return {"speed-up": 1 / speed.ratio, "speed-up interval": [1 / speed.high, 1 / speed.low]}


def prose() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@torch.inference_mode()
def judge(model: nn.Module, windows: Tensor, best: Tensor | None) -> tuple[float, object]:
    """Perplexity, and the share of positions whose likeliest token is that of ``best`` (None: those tokens)."""
    total, likeliest = 0.0, []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        likeliest.append(logits.argmax(-1))
    found = torch.stack(likeliest)
    perplexity = math.exp(total / found.numel())
    return perplexity, found if best is None else float((found == best).float().mean())


def plans(
    model: nn.Module, calibration: Tensor, options: argparse.Namespace
) -> Iterator[tuple[str, int, void_ext.VoidPlan]]:
    traced = models.twin(model)
    with void_ext.patch(traced, alpha=options.alpha, updates=True) as handle, torch.inference_mode():
        traced(calibration, use_cache=False)
        trace = handle.trace
    layers = model.config.num_hidden_layers
    for budget in options.budgets:
        for signal in SIGNALS:
            plan = void_ext.VoidPlan.from_trace(trace, model, signal=signal, budget=budget, at_least=budget)
            yield {"delta": f"voids at {options.alpha:g}"}.get(signal, signal), budget, plan
        last = range(layers - budget, layers)
        yield "last layers", budget, void_ext.VoidPlan.from_layers(model, skip=last)
        inner = random.Random(0).sample(range(2, layers - 1), budget)
        yield "random layers", budget, void_ext.VoidPlan.from_layers(model, skip=sorted(inner))
    # Attention halves alone, ranked by how little their layers change the direction of the stream.
    for budget in options.budgets:
        whole = void_ext.VoidPlan.from_trace(trace, model, signal="cosine", budget=budget, at_least=budget)
        chosen = [layer for layer in range(layers) if whole.response.mlp[layer] != void_ext.Action.RUN]
        yield "attention only, cosine", budget, void_ext.VoidPlan.from_layers(model, attention=chosen)


def line(row: dict[str, object]) -> str:
    low, high = row.get("speed-up interval", (None, None))
    speed = "–" if low is None else f"{row['speed-up']:.2f} ({low:.2f} … {high:.2f})"
    return (
        f"| {row['method']} | {row['budget']} | {row['perplexity']:.4g} | {100 * row['agreement']:.1f} % | {speed} | "
        f"{', '.join(map(str, row['attention off']))} |"
    )


def table(facts: dict[str, object], dense: float, rows: list[dict[str, object]]) -> str:
    head = (
        f"{facts['tokens']['held out']} held-out tokens of {facts['text']} (sha256 {facts['sha256'][:12]}…), "
        f"plans ranked on {facts['tokens']['calibration']} others. Dense: perplexity {dense:.4g}.\n\n"
        "| ranked by | layers off | perplexity | same likeliest token | decode speed-up | which |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(map(line, rows))


if __name__ == "__main__":
    sys.exit(main())
