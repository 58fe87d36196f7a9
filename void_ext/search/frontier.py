"""What was measured, plan by plan: quality against budget for every method, and the best plan of each budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from void_ext.search.baselines import COSINE
from void_ext.search.measure import Quality, ratio
from void_ext.search.units import named


@dataclass(frozen=True)
class Point:
    """One measured plan.

    Attributes:
        method: how it was found. budget: in layers, that it was found for. size: the weights that it goes without, in
            layers; above the budget where halves do not add up to it.
        off: its halves, counted 2l (attention of layer l) and 2l + 1 (its MLP).
        calibration, held_out: its quality on both texts.
        skips_protected: it leaves out some of a layer that is to run always: measured to compare with, never chosen.
    """

    method: str
    budget: float
    size: float
    off: frozenset[int]
    calibration: Quality
    held_out: Quality
    skips_protected: bool = False


@dataclass(frozen=True)
class Frontier:
    """All points, and the dense model's quality on both texts."""

    calibration: Quality
    held_out: Quality
    points: tuple[Point, ...]

    @property
    def budgets(self) -> list[float]:
        return sorted({point.budget for point in self.points})

    def at(self, budget: float) -> list[Point]:
        """The points of a budget, the best on the calibration text first."""
        found = [point for point in self.points if point.budget == budget]
        return sorted(found, key=lambda point: point.calibration.divergence)

    def best(self, budget: float) -> Point:
        """Of the plans measured at this budget that leave protected layers alone, the one with the smallest KL on the
        calibration text.

        The held-out text has no say: what it shows of the plan chosen is then no choice of its own.
        """
        return next(point for point in self.at(budget) if not point.skips_protected)

    def against_cosine(self, point: Point) -> tuple[float, float | None, float | None] | None:
        """Held-out perplexity over that of the cosine ranking at the same budget, with its paired interval:
        :func:`void_ext.search.measure.ratio`."""
        base = next((other for other in self.at(point.budget) if other.method == COSINE), None)
        return None if base is None else ratio(point.held_out, base.held_out)

    def to_dict(self) -> dict[str, Any]:
        """Every point with its means, intervals and values per sequence."""
        rows = []
        for budget in self.budgets:
            best = self.best(budget)
            for point in self.at(budget):
                against = self.against_cosine(point)
                rows.append(
                    {
                        "method": point.method,
                        "budget": point.budget,
                        "size": point.size,
                        "off": named(point.off),
                        "saved": point is best,
                        "skips_protected": point.skips_protected,
                        "calibration": point.calibration.summary(),
                        "held_out": point.held_out.summary(),
                        "held_out_perplexity_over_cosine": None if against is None else list(against),
                        "sequences": {
                            "calibration": point.calibration.to_dict(),
                            "held_out": point.held_out.to_dict(),
                        },
                    }
                )
        return {
            "dense": {"calibration": self.calibration.summary(), "held_out": self.held_out.summary()},
            "points": rows,
        }

    def lines(self) -> Iterable[str]:
        """A Markdown table; the saved plan of each budget in bold, one that skips protected layers said to do so."""
        yield (
            "| budget | method | calibration: perplexity | KL | held out: perplexity | same token | over cosine's "
            "| off |"
        )
        yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
        yield _line("0", "dense", self.calibration, self.held_out, "", "")
        for budget in self.budgets:
            best = self.best(budget)
            same: dict[frozenset[int], list[Point]] = {}  # methods that found one plan share a line
            for point in self.at(budget):
                same.setdefault(point.off, []).append(point)
            for points in same.values():
                point = points[0]
                against = None if any(one.method == COSINE for one in points) else self.against_cosine(point)
                over = "" if against is None else with_interval(*against)
                method = "; ".join(one.method for one in points)
                method = f"**{method}**" if point.off == best.off else method
                method += " (protected layers off: never saved)" * point.skips_protected
                size = f"{budget:g}" if math.isclose(point.size, budget) else f"{budget:g} ({point.size:.3g})"
                yield _line(size, method, point.calibration, point.held_out, over, named(point.off))


def with_interval(ratio: float, low: float | None, high: float | None) -> str:
    """``"0.937 (0.888 … 0.988)"``; the ratio alone where there is no interval."""
    return _times(ratio) if low is None or high is None else f"{_times(ratio)} ({_times(low)} … {_times(high)})"


def _times(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.3g}"


def _line(budget: str, method: str, calibration: Quality, held_out: Quality, over: str, off: str) -> str:
    interval = held_out.summary()["perplexity_interval"]
    spread = "" if interval is None else " ({:.4g} … {:.4g})".format(*interval)
    cells: Sequence[str] = (
        budget,
        method,
        f"{calibration.perplexity:.4g}",
        f"{calibration.divergence:.3f}",
        f"{held_out.perplexity:.4g}{spread}",
        f"{100 * held_out.same:.1f} %",
        over,
        off,
    )
    return "| " + " | ".join(cells) + " |"
