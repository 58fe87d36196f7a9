"""Intervals and comparisons of qualities."""

from __future__ import annotations

import math

import pytest

from void_ext.search.measure import Quality, interval, ratio


def quality(*nll: float) -> Quality:
    return Quality(tuple(0.5 for _ in nll), nll, tuple(0.25 for _ in nll))


def test_means_and_parts() -> None:
    found = Quality((0.1, 0.3), (1.0, 2.0), (0.5, 1.0))
    assert found.divergence == pytest.approx(0.2)
    assert found.perplexity == pytest.approx(math.exp(1.5))
    assert found.same == pytest.approx(0.75)
    assert found.part([1]) == Quality((0.3,), (2.0,), (1.0,))
    summary = found.summary()
    low, high = summary["perplexity_interval"]
    assert low == pytest.approx(math.e)
    assert high == pytest.approx(math.e**2)


def test_the_interval_is_that_of_the_mean_over_sequences() -> None:
    values = [math.sin(index) for index in range(400)]
    low, high = interval(values)
    mean = sum(values) / 400
    error = (sum((value - mean) ** 2 for value in values) / 400 / 400) ** 0.5
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert interval(values) == (low, high)
    assert interval([2.0]) == (2.0, 2.0)


def test_the_ratio_is_paired() -> None:
    """Texts differ far more among each other than two plans do on each."""
    base = quality(1.0, 3.0, 2.0, 5.0)
    subject = quality(1.1, 3.1, 2.1, 5.1)
    middle, low, high = ratio(subject, base)
    assert middle == pytest.approx(math.exp(0.1))
    assert low == pytest.approx(high)
