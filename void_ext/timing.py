"""Which of two things is faster, told apart from the machine's noise: pairs in turns, and an A/A control beside them.

Each round runs the pair (a, b) and the control pair (a, a), the order within a pair alternating from round to round:
drift hits both alike, and whatever the control shows for "equal" is what this machine can resolve at this moment.
The estimate is the median over rounds of b's time by a's, its interval a seeded bootstrap of that median.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

MET = "met"
MISSED = "missed"
NOT_RESOLVABLE = "not resolvable here"


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. Ratios are b's time by a's (1.05: b takes 5 % longer); seconds are raw, per round.

    Attributes:
        ratio, low, high: median of the paired ratios and its bootstrap interval.
        aa_ratio, aa_low, aa_high: the same of the A/A control, whose truth is 1.
        a_seconds, b_seconds: times of a and b in the pairs (a, b).
    """

    ratio: float
    low: float
    high: float
    aa_ratio: float
    aa_low: float
    aa_high: float
    pairs: int
    confidence: float
    a_name: str = "a"
    b_name: str = "b"
    a_seconds: list[float] = field(default_factory=list, repr=False)
    b_seconds: list[float] = field(default_factory=list, repr=False)

    @property
    def a_median(self) -> float:
        """Median seconds of one run of a."""
        return statistics.median(self.a_seconds)

    @property
    def b_median(self) -> float:
        """Median seconds of one run of b."""
        return statistics.median(self.b_seconds)

    def verdict(self, limit: float, *, aa_width: float = 0.02, min_pairs: int = 50) -> str:
        """Whether b stays below ``limit`` times a: ``"met"``, ``"missed"`` or ``"not resolvable here"``.

        Met: the interval's lower end is below ``limit``. Missed: it is not. Neither can be said when there were fewer
        than ``min_pairs`` pairs, or when the control's interval is ``aa_width`` wide or wider, or lies beyond that far
        from 1: then the same thing measured twice would not have passed as the same.
        """
        if not limit > 0:
            raise ValueError(f"limit: expected a ratio > 0, got {limit}")
        if self.pairs < min_pairs or not self.control_holds(aa_width):
            return NOT_RESOLVABLE
        return MET if self.low < limit else MISSED

    def control_holds(self, width: float = 0.02) -> bool:
        """Whether the A/A interval is narrower than ``width`` and no farther than that from 1."""
        return self.aa_high - self.aa_low < width and self.aa_low < 1 + width and self.aa_high > 1 - width

    def resolves(self, width: float = 0.02) -> bool:
        """Whether the ratio is known to within ``width`` and the control agrees."""
        return self.control_holds(width) and self.high - self.low < width

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for ``json.dumps``."""
        return asdict(self)


def compare(
    a: Callable[[], object],
    b: Callable[[], object],
    pairs: int = 50,
    *,
    warmup: int = 2,
    synchronize: Callable[[], object] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    a_name: str = "a",
    b_name: str = "b",
    max_seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time ``b`` against the baseline ``a``, in turns in this process, with an A/A control of the same length.

    Args:
        a, b: what is timed, one call each; ``a`` runs three times a round, ``b`` once.
        pairs: rounds to run.
        warmup: untimed calls of each before the first round.
        synchronize: called after each run and inside its time (``torch.cuda.synchronize``), so that a run ends when
            its work does.
        confidence, resamples, seed: of the bootstrap interval.
        max_seconds: stop after the round that passes this, with fewer pairs (never below 2): the verdict knows.
        progress: called as ``progress(done, pairs)`` between rounds.
        clock: seconds, monotonic.

    Cost: 4 runs a round. The garbage collector is off while a run is timed.
    """
    if pairs < 2:
        raise ValueError(f"pairs: expected at least 2, got {pairs}")
    if warmup < 0:
        raise ValueError(f"warmup: expected a count >= 0, got {warmup}")

    def timed(run: Callable[[], object]) -> float:
        collecting = gc.isenabled()
        gc.disable()
        try:
            start = clock()
            run()
            if synchronize is not None:
                synchronize()
            return clock() - start
        finally:
            if collecting:
                gc.enable()

    def pair(second: Callable[[], object], swap: bool) -> tuple[float, float]:
        if swap:
            second_time = timed(second)
            return timed(a), second_time
        first_time = timed(a)
        return first_time, timed(second)

    for _ in range(warmup):
        timed(a)
        timed(b)
    ab: list[tuple[float, float]] = []
    aa: list[tuple[float, float]] = []
    began = clock()
    for done in range(pairs):
        if progress is not None:
            progress(done, pairs)
        # Four kinds of rounds: either pair first, either member first; over four rounds each position is used alike.
        swap = done % 2 == 1
        for control in ((False, True), (True, False))[done // 2 % 2]:
            if control:
                aa.append(pair(a, swap))
            else:
                ab.append(pair(b, swap))
        if max_seconds is not None and len(ab) >= 2 and clock() - began > max_seconds:
            break
    if progress is not None:
        progress(len(ab), len(ab))
    ratio, low, high = median_interval(_ratios(ab), confidence=confidence, resamples=resamples, seed=seed)
    aa_ratio, aa_low, aa_high = median_interval(_ratios(aa), confidence=confidence, resamples=resamples, seed=seed + 1)
    return Comparison(
        ratio=ratio,
        low=low,
        high=high,
        aa_ratio=aa_ratio,
        aa_low=aa_low,
        aa_high=aa_high,
        pairs=len(ab),
        confidence=confidence,
        a_name=a_name,
        b_name=b_name,
        a_seconds=[first for first, _ in ab],
        b_seconds=[second for _, second in ab],
    )


def median_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The median of ``values`` and the percentile interval of its bootstrap: ``(median, low, high)``.

    The same values and seed give the same interval. Raises ValueError for no values, or any that is not finite.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"values: expected finite numbers, at least one, got {list(values)}")
    draws = np.random.default_rng(seed).integers(0, sample.size, size=(resamples, sample.size))
    medians = np.median(sample[draws], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(np.median(sample)), float(low), float(high)


def _ratios(pairs: Sequence[tuple[float, float]]) -> list[float]:
    # A clock too coarse for the run gives 0: no ratio can be told, which median_interval refuses by name.
    return [second / first if first > 0 else math.nan for first, second in pairs]
