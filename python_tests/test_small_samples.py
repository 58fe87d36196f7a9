"""How much wider the intervals of few values become."""

from __future__ import annotations

import math

import pytest

from void_ext._small_samples import student_t, widening


@pytest.mark.parametrize(
    ("degrees", "confidence", "expected"),
    [
        # Printed tables of Student's t, two-sided.
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (11, 0.95, 2.201),
        (12, 0.99, 3.055),
        (30, 0.90, 1.697),
        (120, 0.95, 1.980),
    ],
)
def test_students_t_is_that_of_the_tables(degrees: int, confidence: float, expected: float) -> None:
    assert student_t(degrees, confidence) == pytest.approx(expected, abs=6e-4)


def test_widening_ends_at_none() -> None:
    assert widening(2, 0.95) == pytest.approx(12.7062 / 1.95996 * math.sqrt(2), rel=1e-4)
    assert widening(12, 0.95) == pytest.approx(1.1729, rel=1e-4)
    assert widening(100_000, 0.95) == pytest.approx(1.0, abs=1e-4)
    factors = [widening(count, 0.95) for count in range(2, 200)]
    assert factors == sorted(factors, reverse=True)


def test_no_spread_is_known_of_one_value() -> None:
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        widening(1, 0.95)
    with pytest.raises(ValueError, match="degrees"):
        student_t(0, 0.95)
    with pytest.raises(ValueError, match="confidence"):
        student_t(3, 1.0)
