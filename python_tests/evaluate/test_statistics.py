"""Intervals and tests against scipy, and against what is known of them."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from void_ext.evaluate.statistics import Metric, difference, mcnemar, score, tango, wilson

MEAN = Metric("mean")


@pytest.mark.parametrize(("successes", "total"), [(0, 1), (0, 20), (20, 20), (130, 161), (1, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_is_scipys(successes: int, total: int, confidence: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(successes, total).proportion_ci(confidence, method="wilson")
    assert wilson(successes, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 1), (5, 0), (3, 9), (400, 460), (7, 7)])
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    total = only_first + only_second
    expected = stats.binomtest(only_first, total, 0.5).pvalue if total else 1.0
    assert mcnemar(only_first, only_second) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("successes", "total"), [(3, 2), (-1, 5), (0, 0)])
def test_wilson_refuses_what_is_no_share(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match="successes: expected"):
        wilson(successes, total)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="got -1 and 2"):
        mcnemar(-1, 2)


def score_statistic(first: int, second: int, total: int, delta: float) -> float:
    """(c - b - n d) over its spread if the difference is d; the likeliest table of that d is looked for on a grid."""
    q = np.linspace(max(0.0, -delta), (1 - delta) / 2, 2_000_001)[1:-1]
    likelihood = first * np.log(q) + (total - first - second) * np.log(1 - 2 * q - delta) + second * np.log(q + delta)
    best = float(q[likelihood.argmax()])
    return (second - first - total * delta) / math.sqrt(total * (2 * best + delta - delta * delta))


@pytest.mark.parametrize(("first", "second", "total"), [(3, 0, 4), (2, 5, 30), (68, 2, 161), (0, 0, 8), (1, 1, 2)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_tangos_interval_is_where_the_score_test_stops_to_refuse(
    first: int, second: int, total: int, confidence: float
) -> None:
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = tango(first, second, total, confidence)
    assert score_statistic(first, second, total, low) == pytest.approx(z, rel=2e-3)
    assert score_statistic(first, second, total, high) == pytest.approx(-z, rel=2e-3)
    other = tango(second, first, total, confidence)
    assert other == pytest.approx((-high, -low))


def test_tangos_interval_covers_the_truth_in_small_samples() -> None:
    """By all tables of 12 items: how likely those are whose interval holds the difference that they come from."""
    total, coverages = 12, []
    intervals = {(b, c): tango(b, c, total) for b in range(total + 1) for c in range(total + 1 - b)}
    for p, q in ((0.05, 0.05), (0.2, 0.1), (0.4, 0.02), (0.3, 0.3)):
        covered = 0.0
        for (b, c), (low, high) in intervals.items():
            ways = math.comb(total, b) * math.comb(total - b, c)
            covered += (low <= q - p <= high) * ways * p**b * q**c * (1 - p - q) ** (total - b - c)
        coverages.append(covered)
    assert min(coverages) > 0.93


def test_tango_refuses_what_is_no_table() -> None:
    for counts in ((3, 2, 4), (-1, 0, 4), (0, 0, 0)):
        with pytest.raises(ValueError, match="only_first, only_second: expected counts"):
            tango(*counts)


def test_pairs_that_never_differ_leave_a_difference_possible() -> None:
    z2 = NormalDist().inv_cdf(0.975) ** 2
    values = [1.0, 0.0] * 4
    for runs in ([values], [values] * 3):
        found = difference(MEAN, runs, runs)
        assert (found.value, found.interval) == (0, "tango")
        assert (found.low, found.high) == pytest.approx((-z2 / (8 + z2), z2 / (8 + z2)))


def test_few_lost_pairs_are_not_sure_to_be_lost() -> None:
    found = difference(MEAN, [[1.0] * 4], [[0.0, 0.0, 0.0, 1.0]])
    assert (found.value, found.only_dense, found.mcnemar_p) == (-0.75, 3, 0.25)
    assert found.high is not None
    assert found.high > 0


@pytest.mark.parametrize(
    ("name", "values"), [("mean", [0.3]), ("perplexity", [-2.0]), ("bits_per_byte", [(-20.0, 9)]), ("mean", [0.5])]
)
def test_of_one_document_no_interval_is_known(name: str, values: list[Any]) -> None:
    found, delta = score(Metric(name), [values]), difference(Metric(name), [values], [values])
    assert (found.low, found.high, delta.low, delta.high) == (None,) * 4


@pytest.mark.parametrize("name", ["mean", "bits_per_byte"])
def test_intervals_over_few_documents_cover_the_truth(name: str) -> None:
    """Percentiles alone cover about 0.87 of the time with 8 documents."""
    rng = np.random.default_rng(0)
    hits, trials = 0, 400
    for _ in range(trials):
        shift = rng.normal(1.0, 1.0, 8)
        base = rng.normal(-20.0, 1.0, 8)
        if name == "mean":
            first, second, truth = base.tolist(), (base + shift).tolist(), 1.0
        else:
            first, second = ([(value, 10) for value in row.tolist()] for row in (base, base - shift))
            truth = 0.1 / math.log(2)
        found = difference(Metric(name), [first], [second])
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    assert hits / trials > 0.925


def test_a_perplexity_of_few_documents_stays_above_nothing() -> None:
    found = score(Metric("perplexity"), [[-1.0, -6.0, -2.0]])
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < found.value < found.high


def test_the_interval_of_a_large_perplexity_may_reach_beyond_what_a_float_holds() -> None:
    found = score(Metric("perplexity"), [[-600.0, -700.0]])
    assert found.value == pytest.approx(math.exp(650))
    assert found.low is not None
    assert 0 < found.low < found.value
    assert found.high == math.inf


def test_a_share_of_several_runs_stays_a_share() -> None:
    found = score(MEAN, [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert found.interval == "bootstrap"
    assert found.high == 1.0


def test_a_binary_score_has_wilsons_interval_and_the_standard_error_of_a_mean() -> None:
    values = [1.0] * 130 + [0.0] * 31
    found = score(MEAN, [values])
    assert found.interval == "wilson"
    assert (found.low, found.high) == wilson(130, 161)
    share = 130 / 161
    assert found.value == pytest.approx(share)
    assert found.stderr == pytest.approx(math.sqrt(share * (1 - share) / 160))


def test_a_paired_difference_knows_that_the_pairs_agree() -> None:
    dense = [1.0, 0.0] * 50
    mode = list(dense)
    mode[0], mode[2], mode[1] = 0.0, 0.0, 1.0  # two lost, one won
    found = difference(MEAN, [dense], [mode])
    assert found.value == pytest.approx(-0.01)
    assert (found.only_dense, found.only_mode, found.mcnemar_p) == (2, 1, 1.0)
    deltas = np.array(mode) - np.array(dense)
    assert found.stderr == pytest.approx(deltas.std(ddof=1) / 10)
    assert found.low is not None
    assert found.high is not None
    # Unpaired, the difference of two shares of 100 would spread over ±0.14.
    assert -0.07 < found.low < -0.01 < found.high < 0.05


def test_the_same_values_differ_by_nothing() -> None:
    values = [0.1, 0.4, 2.5, 1.0]
    found = difference(MEAN, [values], [values])
    assert (found.value, found.stderr, found.low, found.high, found.mcnemar_p) == (0, 0, 0, 0, None)


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400).tolist()
    found = score(MEAN, [values])
    assert found.interval == "bootstrap"
    assert found.stderr is not None
    half = NormalDist().inv_cdf(0.975) * found.stderr
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)


def test_runs_of_one_document_are_no_new_documents() -> None:
    run = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    once, often = score(MEAN, [run]), score(MEAN, [run] * 5)
    assert often.value == once.value
    assert often.stderr == pytest.approx(once.stderr)
    assert (often.low, often.high, often.interval) == (once.low, once.high, "wilson")
    assert difference(MEAN, [run] * 2, [run] * 2).mcnemar_p is None


def test_known_aggregations_are_lm_evals() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    logs = [-1.5, -0.25, -3.0, -2.0]
    weighted = [(-12.0, 5), (-3.5, 2), (-40.0, 17)]
    for name, values in (("perplexity", logs), ("weighted_perplexity", weighted), ("bits_per_byte", weighted)):
        expected = getattr(metrics, name)(values)
        assert Metric(name)(values) == pytest.approx(expected, rel=1e-12)
        # Quick resamples and slow ones of the same function have the same spread.
        quick, slow = score(Metric(name), [values]), score(Metric("unknown", getattr(metrics, name)), [values])
        assert quick.value == slow.value or quick.value == pytest.approx(slow.value, rel=1e-12)
        assert quick.stderr == pytest.approx(slow.stderr, rel=0.5)


def test_what_is_not_finite_has_no_interval() -> None:
    found = score(Metric("weighted_perplexity"), [[(-math.inf, 5), (-3.0, 2)]])
    assert found.value == math.inf
    assert (found.low, found.high, found.stderr) == (None, None, None)
    assert Metric("over", lambda values: math.exp(-values[0]))([-1e6]) == math.inf


def test_other_documents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected the documents and runs of dense, \[2\], got \[3\]"):
        difference(MEAN, [[1.0, 0.0]], [[1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="runs: expected"):
        score(MEAN, [])
    with pytest.raises(ValueError, match="a function beside it, got 'f1'"):
        Metric("f1")
