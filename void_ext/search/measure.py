"""How far a plan's answers are from the dense model's on one text: KL divergence, perplexity, same likeliest token.

Per position t that has a next token: KL(p_t || q_t) = sum_v p_t(v) (log p_t(v) - log q_t(v)) in nats, p of the dense
model, q under the plan; -log q_t(next token); and whether both have the same likeliest token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from void_ext._small_samples import widening
from void_ext.search.prefix import PrefixRunner

#: Positions whose logits are held at a time (128 x 49,152 float32: 25 MB; twice as many cost a CPU half as much again).
CHUNK = 128
RESAMPLES = 10_000


@dataclass(frozen=True)
class Quality:
    """Means over the positions of each sequence, one entry a sequence.

    Attributes:
        kl: nats. nll: nats; perplexity is its exponential. agreement: share of positions.
    """

    kl: tuple[float, ...]
    nll: tuple[float, ...]
    agreement: tuple[float, ...]

    @property
    def divergence(self) -> float:
        """Mean KL, in nats per token."""
        return math.fsum(self.kl) / len(self.kl)

    @property
    def perplexity(self) -> float:
        return math.exp(math.fsum(self.nll) / len(self.nll))

    @property
    def same(self) -> float:
        """Share of positions with the dense model's likeliest token."""
        return math.fsum(self.agreement) / len(self.agreement)

    def part(self, sequences: Iterable[int]) -> Quality:
        """Of these sequences alone."""
        chosen = list(sequences)
        return Quality(*(tuple(values[index] for index in chosen) for values in (self.kl, self.nll, self.agreement)))

    def to_dict(self) -> dict[str, list[float]]:
        return {name: list(getattr(self, name)) for name in ("kl", "nll", "agreement")}

    def summary(self) -> dict[str, Any]:
        """The means, each with its 95 % interval over sequences; None for the interval of a single one."""
        nll, kl, same = interval(self.nll), interval(self.kl), interval(self.agreement)
        return {
            "kl": self.divergence,
            "kl_interval": None if kl is None else [max(kl[0], 0.0), kl[1]],
            "perplexity": self.perplexity,
            "perplexity_interval": None if nll is None else [math.exp(nll[0]), math.exp(nll[1])],
            "agreement": self.same,
            "agreement_interval": None if same is None else [max(same[0], 0.0), min(same[1], 1.0)],
        }


def interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """The interval of a mean over sequences; None for a single one, of which no spread is known.

    The percentile interval of the bootstrapped mean, its ends moved away from the mean by
    :func:`void_ext._small_samples.widening`: over a dozen sequences the percentiles alone cover 0.90 instead of 0.95.
    Sequences are drawn, as tokens of one are not independent.
    """
    return None if len(values) < 2 else _interval(tuple(values), confidence, seed)


@lru_cache(maxsize=4096)
def _interval(values: tuple[float, ...], confidence: float, seed: int) -> tuple[float, float]:
    sample = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, sample.size, size=(RESAMPLES, sample.size))
    tail = (1 - confidence) / 2
    low, high = np.quantile(sample[draws].mean(1), [tail, 1 - tail])
    middle, factor = math.fsum(values) / len(values), widening(len(values), confidence)
    return middle + factor * (float(low) - middle), middle + factor * (float(high) - middle)


def ratio(subject: Quality, base: Quality) -> tuple[float, float | None, float | None]:
    """Perplexity of ``subject`` over that of ``base`` on the same sequences: the ratio and its paired 95 % interval,
    whose ends are None for a single sequence."""
    differences = [a - b for a, b in zip(subject.nll, base.nll, strict=True)]
    middle, found = math.exp(math.fsum(differences) / len(differences)), interval(differences)
    return (middle, None, None) if found is None else (middle, math.exp(found[0]), math.exp(found[1]))


class Judge:
    """Compares streams after the last layer with the dense model's, on one text.

    Args:
        ids: ``[S, T]``, T >= 2.
        dense: the dense model's streams after the last layer, ``[1, T, D]`` per sequence.
        room: bytes that may go to keeping the dense model's probabilities; for the positions beyond it they are made
            anew at each comparison (one more head per position). Never are two full tables of logits held.

    Attributes:
        heads: positions that final norm and head were run for.
    """

    def __init__(self, runner: PrefixRunner, ids: Tensor, dense: Sequence[Tensor], room: int = 1 << 30):
        self.runner = runner
        self.ids = ids
        self.heads = 0
        self._dense = dense
        self._room = room
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def dense(self) -> Quality:
        """The dense model against itself."""
        return self.measure(self._dense)

    @torch.inference_mode()
    def measure(self, finals: Sequence[Tensor], sequences: Iterable[int] | None = None) -> Quality:
        """Of a plan, from its streams after the last layer, of the sequences named (None: all).

        Raises ValueError where its logits are not finite.
        """
        chosen = range(len(self.ids)) if sequences is None else sequences
        rows = [self._sequence(index, final) for index, final in zip(chosen, finals, strict=True)]
        kl, nll, same = zip(*rows, strict=True)
        return Quality(kl, nll, same)

    def _sequence(self, index: int, final: Tensor) -> tuple[float, float, float]:
        length = self.ids.shape[1] - 1
        sums = torch.zeros(3, dtype=torch.float64, device=final.device)
        for start in range(0, length, CHUNK):
            span = slice(start, min(start + CHUNK, length))
            likely, mass, entropy, best = self._reference(index, span)
            logits = self._logits(index, span, final)
            following = self.ids[index, span.start + 1 : span.stop + 1, None].to(logits.device)
            total = logits.logsumexp(-1)
            kl = mass * total - torch.linalg.vecdot(likely, logits) - entropy
            nll = total - logits.gather(-1, following)[:, 0]
            same = logits.argmax(-1) == best
            sums += torch.stack([part.double().sum() for part in (kl, nll, same)]).to(sums.device)
        found = [value / length for value in sums.tolist()]
        if not all(map(math.isfinite, found)):
            raise ValueError(
                f"model: its logits under this plan are not finite (sequence {index}); a wider dtype may help (float32)"
            )
        return found[0], found[1], found[2]

    def _reference(self, index: int, span: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The dense model's probabilities, their sum (1 but for rounding), their entropy and the likeliest token."""
        key = (index, span.start)
        if key in self._kept:
            return self._kept[key]
        logits = self._logits(index, span, self._dense[index])
        best = logits.argmax(-1)
        logs = logits.log_softmax(-1)
        likely = logs.exp()
        made = likely, likely.sum(-1), -torch.linalg.vecdot(likely, logs), best
        size = likely.numel() * likely.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[key] = made
        return made

    def _logits(self, index: int, span: slice, final: Tensor) -> Tensor:
        self.heads += span.stop - span.start
        return self.runner.logits(self.ids[index : index + 1, span], final[:, span]).float()
