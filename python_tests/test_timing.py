"""The timing protocol, on a clock that the test drives: nothing here depends on the speed of the machine."""

from __future__ import annotations

import dataclasses
import gc
import json
import random

import pytest

from void_ext.timing import MET, MISSED, NOT_RESOLVABLE, Comparison, compare, median_interval


class Bench:
    """Two runnables that take as long as they are told, on a clock of their own."""

    def __init__(self, a: float, b: float, noise: float = 0.0, drift: float = 0.0):
        self.now = 0.0
        self.calls: list[str] = []
        self.collecting: list[bool] = []
        self._seconds = {"a": a, "b": b}
        self._noise, self._drift = noise, drift
        self._random = random.Random(3)

    def clock(self) -> float:
        return self.now

    def run(self, name: str) -> None:
        self.calls.append(name)
        self.collecting.append(gc.isenabled())
        slow = 1 + self._drift * len(self.calls) + self._noise * abs(self._random.gauss(0, 1))
        self.now += self._seconds[name] * slow

    def compare(self, **options: object) -> Comparison:
        return compare(lambda: self.run("a"), lambda: self.run("b"), clock=self.clock, **options)  # type: ignore[arg-type]


def test_ratio_is_time_of_b_by_time_of_a() -> None:
    result = Bench(a=1.0, b=1.25).compare(pairs=8)
    assert result.ratio == pytest.approx(1.25)
    assert (result.low, result.high) == (pytest.approx(1.25), pytest.approx(1.25))
    assert (result.aa_low, result.aa_high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert result.a_median == pytest.approx(1.0)
    assert result.b_median == pytest.approx(1.25)


def test_runs_take_turns_in_alternating_order_with_a_control_as_long() -> None:
    bench = Bench(a=1.0, b=1.0)
    bench.compare(pairs=4, warmup=0)
    rounds = ["".join(bench.calls[at : at + 4]) for at in range(0, 16, 4)]
    assert rounds == ["abaa", "baaa", "aaab", "aaba"]


def test_drift_does_not_look_like_a_difference() -> None:
    # Each run is 0.2 % slower than the one before: b, run second in half of the pairs, must not pay for it.
    result = Bench(a=1.0, b=1.0, drift=0.002).compare(pairs=50)
    assert result.ratio == pytest.approx(1.0, abs=1e-3)
    assert result.aa_ratio == pytest.approx(1.0, abs=1e-3)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(7)
    covered, widths = 0, {20: 0.0, 80: 0.0}
    for trial in range(200):
        values = [draw.lognormvariate(0, 0.05) for _ in range(50)]
        _, low, high = median_interval(values, seed=trial, resamples=500)
        covered += low <= 1.0 <= high
    assert 180 <= covered <= 199  # of 200, at 95 %
    for size in widths:
        for trial in range(20):
            _, low, high = median_interval([draw.gauss(1, 0.05) for _ in range(size)], seed=trial, resamples=500)
            widths[size] += high - low
    assert 0.35 < widths[80] / widths[20] < 0.7  # four times the pairs, about half the width


def test_noise_does_not_hide_a_difference() -> None:
    result = Bench(a=1.0, b=1.1, noise=0.05).compare(pairs=400)
    assert 1.08 < result.low < result.ratio < result.high < 1.12
    assert 0.98 < result.aa_low < result.aa_high < 1.02


def test_same_seed_same_interval() -> None:
    values = [random.Random(1).gauss(1, 0.1) for _ in range(9)] + [1.0, 1.3]
    assert median_interval(values, seed=5) == median_interval(values, seed=5)
    median, low, high = median_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (median, low, high) == (3.0, 1.0, 100.0)


def test_synchronize_counts_and_warmup_does_not() -> None:
    bench = Bench(a=1.0, b=1.0)

    def synchronize() -> None:
        bench.now += 1.0

    result = compare(
        lambda: bench.run("a"), lambda: bench.run("b"), 2, warmup=3, synchronize=synchronize, clock=bench.clock
    )
    assert result.a_median == pytest.approx(2.0)
    assert bench.calls[:6] == ["a", "b"] * 3
    assert len(bench.calls) == 6 + 8


def test_collector_is_off_inside_and_as_before_outside() -> None:
    bench = Bench(a=1.0, b=1.0)
    assert gc.isenabled()
    bench.compare(pairs=2)
    assert not any(bench.collecting)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        compare(lambda: 1 / 0, lambda: None, 2)
    assert gc.isenabled()


def test_time_limit_ends_early_and_says_how_many_pairs() -> None:
    reports: list[tuple[int, int]] = []
    bench = Bench(a=1.0, b=1.0)
    result = bench.compare(pairs=50, max_seconds=10.0, progress=lambda done, of: reports.append((done, of)))
    assert result.pairs == 3
    assert reports == [(0, 50), (1, 50), (2, 50), (3, 3)]
    assert len(result.a_seconds) == len(result.b_seconds) == 3


GOOD = Comparison(1.004, 0.998, 1.011, 1.0, 0.995, 1.006, pairs=50, confidence=0.95)


@pytest.mark.parametrize(
    ("changes", "limit", "expected"),
    [
        ({}, 1.01, MET),
        ({}, 0.999, MET),  # the lower end is below
        ({}, 0.998, MISSED),  # the lower end is not below
        ({"aa_high": 1.016}, 1.01, NOT_RESOLVABLE),  # control 0.021 wide
        ({"aa_high": 1.016}, 0.9, NOT_RESOLVABLE),  # no miss either without a control
        ({"aa_low": 1.05, "aa_high": 1.06}, 1.01, NOT_RESOLVABLE),  # narrow, but 5 % away from equal
        ({"pairs": 49}, 1.01, NOT_RESOLVABLE),
    ],
)
def test_verdict(changes: dict[str, float], limit: float, expected: str) -> None:
    assert dataclasses.replace(GOOD, **changes).verdict(limit) == expected  # type: ignore[arg-type]


def test_resolves_wants_both_intervals_narrow() -> None:
    assert GOOD.resolves()
    assert not dataclasses.replace(GOOD, high=1.02).resolves()
    assert not dataclasses.replace(GOOD, aa_high=1.02).resolves()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="pairs: expected at least 2, got 1"):
        compare(lambda: None, lambda: None, 1)
    with pytest.raises(ValueError, match="warmup"):
        compare(lambda: None, lambda: None, 2, warmup=-1)
    with pytest.raises(ValueError, match="limit"):
        GOOD.verdict(float("nan"))
    with pytest.raises(ValueError, match="values"):
        median_interval([])
    with pytest.raises(ValueError, match="confidence"):
        median_interval([1.0], confidence=1.0)
    with pytest.raises(ValueError, match="values: expected finite"):  # a clock that stands still
        compare(lambda: None, lambda: None, 2, clock=lambda: 0.0)


def test_to_dict_is_json() -> None:
    result = Bench(a=1.0, b=2.0).compare(pairs=2, a_name="plain", b_name="traced")
    back = json.loads(json.dumps(result.to_dict()))
    assert (back["ratio"], back["a_name"], len(back["b_seconds"])) == (2.0, "plain", 2)
