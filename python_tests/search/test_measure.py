"""Intervals and comparisons of qualities."""

from __future__ import annotations

import math
import random

import pytest

from void_ext._small_samples import widening
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
    factor = widening(2, 0.95)
    assert low == pytest.approx(math.exp(1.5 - 0.5 * factor))
    assert high == pytest.approx(math.exp(1.5 + 0.5 * factor))
    # Neither is defined beyond these.
    assert summary["agreement_interval"] == [0.0, 1.0]
    assert summary["kl_interval"][0] == 0.0


def test_the_interval_is_that_of_the_mean_over_sequences() -> None:
    values = [math.sin(index) for index in range(400)]
    found = interval(values)
    assert found is not None
    mean = sum(values) / 400
    error = (sum((value - mean) ** 2 for value in values) / 400 / 400) ** 0.5
    assert found[0] == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert found[1] == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert interval(values) == found


def test_intervals_over_a_dozen_sequences_cover_what_they_say() -> None:
    """Percentiles alone cover the mean of 912 of these 1000 samples."""
    draw = random.Random(0)
    covered = 0
    for _ in range(1000):
        found = interval([draw.gauss(3.0, 0.5) for _ in range(12)])
        assert found is not None
        covered += found[0] <= 3.0 <= found[1]
    assert 930 <= covered <= 970


def test_one_sequence_has_no_interval() -> None:
    assert interval([2.0]) is None
    summary = quality(2.0).summary()
    assert [summary[f"{name}_interval"] for name in ("kl", "perplexity", "agreement")] == [None] * 3
    assert ratio(quality(2.5), quality(2.0)) == (pytest.approx(math.exp(0.5)), None, None)


def test_the_ratio_is_paired() -> None:
    """Texts differ far more among each other than two plans do on each."""
    base = quality(1.0, 3.0, 2.0, 5.0)
    subject = quality(1.1, 3.1, 2.1, 5.1)
    middle, low, high = ratio(subject, base)
    assert middle == pytest.approx(math.exp(0.1))
    assert low == pytest.approx(high)
