"""How much wider a bootstrap interval of a mean must be when few values are drawn from."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist


@lru_cache(maxsize=256)
def widening(count: int, confidence: float) -> float:
    r"""The factor for the distances of a percentile interval's ends from the mean of ``count`` values.

    ``t / z * sqrt(n / (n - 1))``, t and z the two-sided quantiles of Student's t with n - 1 degrees of freedom and of
    the normal distribution: resampling spreads by ``sqrt((n - 1) / n)`` too little, and knows nothing of the error of
    its own spread. 1.17 for 12 values, 1.002 for 1000.

    Raises ValueError for ``count`` < 2, of which no spread is known.
    Source: the factor on z of the expanded percentile interval, T. C. Hesterberg, "What Teachers Should Know About the
    Bootstrap", The American Statistician 69 (2015).
    """
    if count < 2:
        raise ValueError(f"count: expected at least 2 values, got {count}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return student_t(count - 1, confidence) / z * math.sqrt(count / (count - 1))


def student_t(degrees: int, confidence: float) -> float:
    """The t within which Student's t of so many degrees of freedom lies with probability ``confidence``: two-sided."""
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"degrees, confidence: expected a count >= 1 and a share below 1, got {degrees} and {confidence}"
        )
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if _within(angle, degrees) < confidence:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan(high)


def _within(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)). Source: Abramowitz & Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = 1.0
    first = 1 + degrees % 2  # the series goes by even factors over odd ones, or the other way round
    for factor in range(first, degrees - 2, 2):
        term *= factor / (factor + 1) * cosine * cosine
        total += term
    if degrees % 2 == 0:
        return sine * total
    return 2 / math.pi * (angle + (sine * cosine * total if degrees > 1 else 0.0))
