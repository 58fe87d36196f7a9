"""Scores with their uncertainty: standard errors, Wilson's and Tango's intervals, paired differences, McNemar's test.

Items are documents. Where a document was answered in several runs (seeds), its values stay together: the bootstrap
draws documents, and the standard error is that of the documents' means.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from void_ext._small_samples import widening

CONFIDENCE = 0.95
DRAWS = 2000
_DRAWS_OF_OTHERS = 200  # an aggregation that can only be called once per draw
_CHUNK = 200

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Score:
    """An aggregated metric: ``value`` with its standard error and interval, and how the interval was made."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    interval: str  # "wilson" or "bootstrap"; low and high are None where one document is all there is


@dataclass(frozen=True)
class Difference:
    """A mode's score minus the dense one's, over the same documents.

    Attributes:
        interval: ``"tango"`` where documents have 0 or 1 in both, else ``"bootstrap"``.
        only_dense, only_mode, mcnemar_p: of metrics of 0 and 1 in one run.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    interval: str
    only_dense: int | None = None
    only_mode: int | None = None
    mcnemar_p: float | None = None


def wilson(successes: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share: ``(low, high)``.

    ``(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)``; it stays inside [0, 1] and has a width at 0 and 1.
    Source: E. B. Wilson, JASA 22 (1927).
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"successes: expected 0 … total of at least 1, got {successes} of {total}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test, from the items that only one of two got right.

    ``min(1, 2 P(X <= min))`` with ``X ~ Binomial(only_first + only_second, 1/2)``; 1 where they never differ.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"only_first, only_second: expected counts >= 0, got {only_first} and {only_second}")
    total = only_first + only_second
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << total))


def tango(only_first: int, only_second: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    r"""Tango's score interval of the difference of two shares over the same items, second minus first: ``(low, high)``.

    All d with ``|c - b - n d| <= z sqrt(n (2 q + d (1 - d)))``, b and c the items that only the first and only the
    second got right, q the likeliest share of the former if the difference were d. At d = 0 that is McNemar's test
    without a correction. It has a width where no item differs: ± z² / (n + z²).

    Args:
        only_first, only_second: items that only one of the two got right.
        total: all items.
    Source: T. Tango, Statistics in Medicine 17 (1998), 891-908.
    """
    if min(only_first, only_second) < 0 or not 0 < max(1, only_first + only_second) <= total:
        raise ValueError(
            f"only_first, only_second: expected counts >= 0 of {total} items together, got {only_first}, {only_second}"
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (only_second - only_first) / total

    def fits(delta: float) -> bool:
        gap = only_second - only_first - total * delta
        # The likeliest share of items that only the first got right, given delta: a root of 2 n q² + b q + c = 0.
        b = (2 * total + only_first - only_second) * delta - only_first - only_second
        c = -only_first * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 8 * total * c)) - b) / (4 * total)
        return gap * gap <= z * z * total * max(0.0, 2 * q + delta * (1 - delta))

    ends = []
    for outside in (-1.0, 1.0):
        inside = middle
        for _ in range(60):
            half = (inside + outside) / 2
            inside, outside = (half, outside) if fits(half) else (inside, half)
        ends.append(inside)
    return ends[0], ends[1]


class Metric:
    """How the values of documents become one number.

    Args:
        name: of the aggregation. lm-eval's ``"mean"``, ``"perplexity"``, ``"weighted_perplexity"`` and
            ``"bits_per_byte"`` are understood, so that their resamples are quick.
        function: aggregates a list of the values of single documents; it is the word on the value itself.
    """

    def __init__(self, name: str, function: Callable[[list[Any]], float] | None = None):
        if name not in _KNOWN and function is None:
            raise ValueError(f"name: expected one of {', '.join(_KNOWN)}, or a function beside it, got {name!r}")
        self.name = name
        self.function = function

    def agrees_with(self, other: Metric) -> bool:
        """Whether both put values together in the same way: the same function, or the same code loaded twice."""
        ours, theirs = (getattr(one.function, "__code__", one.function) for one in (self, other))
        return self.name == other.name and (ours is theirs or ours == theirs)

    def __call__(self, values: Sequence[Any]) -> float:
        """The aggregated value."""
        if self.function is None:
            return float(self._weighted(_columns(values), np.ones((1, len(values))))[0])
        try:
            return float(self.function(list(values)))
        except OverflowError:
            return math.inf

    def _weighted(self, columns: Array, weights: Array) -> Array:
        """``[draws]``, from columns ``[values, 1 or 2]`` and weights ``[draws, values]``."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            sums: Array = weights @ columns
            below = sums[:, 1] if columns.shape[1] == 2 else weights.sum(1)
            ratio: Array = sums[:, 0] / below
            if self.name == "bits_per_byte":
                ratio = -ratio / math.log(2)
            elif self.name != "mean":
                ratio = np.exp(-ratio)
        return ratio

    def bootstrap(self, runs: Sequence[Sequence[Sequence[Any]]], seed: int) -> Array:
        """``[subjects, draws]`` of the metric over the same draws of documents.

        Args:
            runs: per subject, per run, the values of all documents in the same order.
        """
        documents = len(runs[0][0])
        known = self.name in _KNOWN
        draws = DRAWS if known else _DRAWS_OF_OTHERS
        rng = np.random.default_rng(seed)
        found = []
        tables = [_columns([value for run in subject for value in run]) for subject in runs] if known else []
        for start in range(0, draws, _CHUNK):
            rows = min(_CHUNK, draws - start)
            chosen = rng.integers(0, documents, size=(rows, documents))
            if known:
                counts = np.stack([np.bincount(row, minlength=documents) for row in chosen]).astype(np.float64)
                found.append(
                    [
                        self._weighted(table, np.tile(counts, len(subject)))
                        for table, subject in zip(tables, runs, strict=True)
                    ]
                )
            else:
                found.append(
                    [
                        np.array([self([run[index] for run in subject for index in row]) for row in chosen])
                        for subject in runs
                    ]
                )
        return np.concatenate([np.stack(part) for part in found], axis=1)


_KNOWN = ("mean", "perplexity", "weighted_perplexity", "bits_per_byte")
_EXPONENTIALS = ("perplexity", "weighted_perplexity")


def score(metric: Metric, runs: Sequence[Sequence[Any]], *, confidence: float = CONFIDENCE, seed: int = 0) -> Score:
    """The metric over documents ``runs[run][document]``, with its uncertainty over documents.

    Wilson's interval where documents have 0 or 1 (in several runs: the same in all), else the percentiles of a seeded
    bootstrap, their distances from the value widened for few documents (:func:`void_ext._small_samples.widening`; of
    perplexities on the scale of their logarithms). None for one document.
    """
    _check_runs(runs)
    value = metric([value for run in runs for value in run])
    means = _document_means(runs) if metric.name == "mean" else []
    stderr = _stderr_of_mean(means) if means else None
    if means and is_binary(means):
        return Score(value, stderr, *wilson(round(sum(means)), len(means), confidence), "wilson")
    draws = metric.bootstrap([runs], seed)[0]
    with np.errstate(invalid="ignore", over="ignore"):
        if metric.name in _EXPONENTIALS:
            ends = _widened(math.log(value), np.log(draws), len(runs[0]), confidence)
            # numpy's, which gives inf where math's would end it all: the widened end may be too large for a float.
            low, high = (None if end is None else float(np.exp(end)) for end in ends)
        else:
            low, high = _widened(value, draws, len(runs[0]), confidence)
    if means and low is not None and high is not None and all(map(is_binary, runs)):
        low, high = max(0.0, low), min(1.0, high)
    return Score(value, stderr if metric.name == "mean" else _spread(draws), low, high, "bootstrap")


def difference(
    metric: Metric,
    dense: Sequence[Sequence[Any]],
    mode: Sequence[Sequence[Any]],
    *,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Difference:
    """The metric of ``mode`` minus that of ``dense``, paired by document.

    Tango's interval where documents have 0 or 1 in both (in several runs: the same in all), else a paired bootstrap:
    both see the same draws of documents; its percentiles are widened as those of :func:`score`. None for one document.

    Args:
        dense, mode: ``[run][document]``, the same documents and runs in the same order.
    """
    for runs in (dense, mode):
        _check_runs(runs)
    if [len(run) for run in dense] != [len(run) for run in mode]:
        raise ValueError(
            f"mode: expected the documents and runs of dense, {[len(run) for run in dense]}, "
            f"got {[len(run) for run in mode]}"
        )
    value = metric([v for run in mode for v in run]) - metric([v for run in dense for v in run])
    if metric.name == "mean":
        return _difference_of_means(value, dense, mode, confidence, seed)
    drawn = metric.bootstrap([dense, mode], seed)
    with np.errstate(invalid="ignore"):
        draws = drawn[1] - drawn[0]
    return Difference(value, _spread(draws), *_widened(value, draws, len(dense[0]), confidence), "bootstrap")


def _difference_of_means(
    value: float, dense: Sequence[Sequence[Any]], mode: Sequence[Sequence[Any]], confidence: float, seed: int
) -> Difference:
    firsts, seconds = _document_means(dense), _document_means(mode)
    deltas = [second - first for first, second in zip(firsts, seconds, strict=True)]
    stderr = _stderr_of_mean(deltas)
    if not (is_binary(firsts) and is_binary(seconds)):
        draws = Metric("mean").bootstrap([[deltas]], seed)[0]
        return Difference(value, stderr, *_widened(value, draws, len(deltas), confidence), "bootstrap")
    only_dense, only_mode = sum(delta < 0 for delta in deltas), sum(delta > 0 for delta in deltas)
    found = Difference(value, stderr, *tango(only_dense, only_mode, len(deltas), confidence), "tango")
    if len(dense) > 1:
        return found
    return dataclasses.replace(
        found, only_dense=only_dense, only_mode=only_mode, mcnemar_p=mcnemar(only_dense, only_mode)
    )


def is_binary(values: Sequence[Any]) -> bool:
    """Whether all values are 0 or 1."""
    return all(isinstance(value, (bool, int, float)) and value in (0, 1) for value in values)


def _check_runs(runs: Sequence[Sequence[Any]]) -> None:
    if not runs or not runs[0] or any(len(run) != len(runs[0]) for run in runs):
        raise ValueError(f"runs: expected runs over the same documents, at least one, got {[len(run) for run in runs]}")


def _columns(values: Sequence[Any]) -> Array:
    table = np.asarray(values, dtype=np.float64)
    return table[:, None] if table.ndim == 1 else table


def _document_means(runs: Sequence[Sequence[Any]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*runs, strict=True)]


def _stderr_of_mean(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1)) / math.sqrt(len(values))


def _spread(draws: Array) -> float | None:
    if draws.size < 2:
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        spread = float(np.std(draws, ddof=1))
    return spread if math.isfinite(spread) else None


def _widened(value: float, draws: Array, documents: int, confidence: float) -> tuple[float | None, float | None]:
    if documents < 2 or not math.isfinite(value) or not np.isfinite(draws).all():
        return None, None
    tail, factor = (1 - confidence) / 2, widening(documents, confidence)
    low, high = (value + factor * (float(end) - value) for end in np.quantile(draws, [tail, 1 - tail]))
    return low, high
