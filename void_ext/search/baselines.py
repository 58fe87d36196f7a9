"""Plans that nobody searched for: rankings by a trace, the last layers, random ones."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from void_ext._selection import SIGNALS, Criterion
from void_ext.patching import patch
from void_ext.patching.structure import find_decoder_stack
from void_ext.plan import VoidPlan
from void_ext.search.units import halves_of, off_of
from void_ext.trace import Trace

COSINE = "cosine"
_WORDS = {"abs_delta": "absolute delta", "relative_update": "relative update", "cosine": COSINE}


@torch.inference_mode()
def trace_of(model: nn.Module, ids: Tensor, alpha: float) -> list[Trace]:
    """One traced pass over sequences ``[S, T]``, a trace for each; the head is not run."""
    body = find_decoder_stack(model).body
    traces = []
    with patch(model, alpha=alpha, updates=True) as handle:
        for row in ids:
            body(input_ids=row[None], use_cache=False)
            assert handle.trace is not None
            traces.append(handle.trace)
    return traces


def rankings(
    traces: Sequence[Trace], budgets: Iterable[int], alpha: float, protect: Sequence[int], protect_default: bool
) -> Iterator[tuple[str, int, frozenset[int]]]:
    """The method, the budget and the halves off, for every signal: all from the same traces."""
    for budget in budgets:
        for signal in SIGNALS:
            plan = VoidPlan.from_trace(
                traces,
                signal=signal,
                alpha=alpha if signal == "delta" else None,
                budget=budget,
                at_least=budget,
                protect=protect,
                protect_default=protect_default,
            )
            yield _WORDS.get(signal, f"voids at {alpha:g}"), budget, off_of(plan)


def blind(
    layers: int, budgets: Iterable[int], seeds: int, protect: Sequence[int], protect_default: bool
) -> Iterator[tuple[str, int, frozenset[int]]]:
    """The same for the last layers, protected or not, and for layers drawn from those that are not, once for each seed.

    What cutting off the end does is worth knowing, though the default protects it: a reader compares with it.
    """
    kept = Criterion(budget=0, protect=protect, protect_default=protect_default).protected(layers)
    free = [layer for layer in range(layers) if layer not in kept]
    for budget in budgets:
        yield "last layers", budget, halves_of(range(layers - budget, layers))
        for seed in range(seeds):
            yield f"random, seed {seed}", budget, halves_of(random.Random(seed).sample(free, budget))
