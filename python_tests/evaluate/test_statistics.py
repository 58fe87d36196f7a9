"""Intervals and tests against scipy, and against what is known of them."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from void_ext.evaluate.statistics import Metric, difference, mcnemar, score, wilson

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
    assert -0.06 < found.low < -0.01 < found.high < 0.04


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
    assert often.interval == "bootstrap"
    assert often.low is not None
    assert often.low < 0.5
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
