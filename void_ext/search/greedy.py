"""Greedy search: leave out what hurts least, one unit after the other, each measured by KL to the dense logits.

The first step measures every unit. A later one measures those alone whose last measured damage was the smallest (the
shortlist): damage is relative, and changes slowly as layers go. Each measurement runs what comes behind the unit, so a
step costs half of what whole passes would for every unit, and the shortlist's share of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from void_ext.search.measure import Judge, Quality
from void_ext.search.prefix import Prefixes, launches
from void_ext.search.units import Unit

SHORTLIST = 7
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Step:
    """One unit that went.

    Attributes:
        unit: its name.
        size: of all that has gone, in layers.
        quality: on the calibration text, of the plan so far.
        damages: what was measured in this step: the growth of the mean KL per layer's weight, by unit.
    """

    unit: str
    size: float
    quality: Quality
    damages: dict[str, float]


@dataclass
class Greedy:
    """The state of a search, from which it can go on.

    Args:
        units: what may go; budgets: in layers, ascending: where the weights of what is left to the next budget are
            fewer than a unit's, the unit is judged by those.
        shortlist: how many units a later step measures.
    """

    units: Sequence[Unit]
    budgets: Sequence[float]
    prefixes: Prefixes
    judge: Judge
    shortlist: int = SHORTLIST
    steps: list[Step] = field(default_factory=list)
    _damages: dict[str, float] = field(default_factory=dict)
    _left: dict[str, Unit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        done, self.steps = self.steps, []
        self._left = {unit.name: unit for unit in self.units}
        for step in done:
            if step.unit not in self._left or not self._left.keys() >= step.damages.keys() >= {step.unit}:
                raise ValueError(f"steps: expected one of the units left and what was measured, got {step.unit!r}")
            self._take(step)
        if done and not self._damages.keys() >= self._left.keys():
            raise ValueError("steps: expected a first one that measured every unit")
        if self.prefixes.off != self.off:
            self.prefixes.adopt(self.off)

    @property
    def off(self) -> frozenset[int]:
        """The halves that have gone."""
        return frozenset(half for unit in self.units if unit.name not in self._left for half in unit.halves)

    @property
    def size(self) -> float:
        return self.steps[-1].size if self.steps else 0.0

    @property
    def finished(self) -> bool:
        return _reached(self.size, self.budgets[-1]) or not self._left

    def candidates(self) -> list[Unit]:
        """What the next step measures, the most promising first."""
        left = list(self._left.values())
        if not self.steps:
            return left
        return sorted(left, key=lambda unit: self._damages[unit.name])[: self.shortlist]

    def step(self, report: Report = lambda done, total: None) -> Step:
        """Let one more unit go. Nothing changes where it is interrupted."""
        off, candidates = self.off, self.candidates()
        before = self.steps[-1].quality.divergence if self.steps else 0.0
        need = next(budget for budget in self.budgets if not _reached(self.size, budget)) - self.size
        found: dict[str, Quality] = {}
        useful: dict[str, float] = {}
        damages: dict[str, float] = {}
        for done, unit in enumerate(candidates):
            report(done, len(candidates))
            found[unit.name] = quality = self.judge.measure(self.prefixes.run(off | unit.halves))
            grown = quality.divergence - before
            damages[unit.name] = grown / unit.weight
            useful[unit.name] = grown / min(unit.weight, need)
        best = self._left[min(useful, key=lambda name: useful[name])]
        step = Step(best.name, self.size + best.weight, found[best.name], damages)
        self.prefixes.adopt(off | best.halves)
        self._take(step)
        report(len(candidates), len(candidates))
        return step

    def at(self, budget: float) -> tuple[frozenset[int], Step] | None:
        """The halves off, and the step, with which ``budget`` was reached first; None: not yet."""
        gone: set[int] = set()
        by_name = {unit.name: unit for unit in self.units}
        for step in self.steps:
            gone |= by_name[step.unit].halves
            if _reached(step.size, budget):
                return frozenset(gone), step
        return None

    def _take(self, step: Step) -> None:
        self._damages |= step.damages
        del self._left[step.unit]
        self.steps.append(step)


def _reached(size: float, budget: float) -> bool:
    # Weights of halves are fractions: their sum may miss the budget by a rounding.
    return size >= budget - 1e-9


@dataclass(frozen=True)
class Cost:
    """What a greedy search takes at most, told before it begins.

    Attributes:
        layers: layer evaluations: one layer over the whole calibration text, a half of one counting 0.5.
        whole_passes: the same for a search that measures every unit left at each step, by whole passes.
        plans: how many plans are measured, each with final norm and head over the whole text.
    """

    layers: float
    whole_passes: float
    plans: int


def most(units: Sequence[Unit], layers: int, budget: float, shortlist: int) -> Cost:
    """The bound on :class:`Greedy`: with the lightest units first, and each step's longest runs."""
    steps = _steps(units, budget)
    ordered = sorted(units, key=lambda unit: unit.first)
    halves = plans = whole = 0
    for step in range(steps):
        # Those that have gone are the last ones: then each candidate's run is as long as it can be.
        left = ordered[: len(ordered) - step]
        size = sum(len(unit.halves) for unit in ordered) - sum(len(unit.halves) for unit in left)
        gone = frozenset(half for unit in ordered[len(left) :] for half in unit.halves)
        measured = left if step == 0 else left[:shortlist]
        plans += len(measured)
        halves += sum(launches(gone | unit.halves, unit.first, layers) for unit in measured)
        halves += launches(gone | left[0].halves, left[0].first, layers)  # the streams behind what goes, kept anew
        whole += sum(2 * layers - size - len(unit.halves) for unit in left)
    return Cost(halves / 2, whole / 2, plans)


def _steps(units: Sequence[Unit], budget: float) -> int:
    size = 0.0
    for count, weight in enumerate(sorted(unit.weight for unit in units), 1):
        size += weight
        if _reached(size, budget):
            return count
    return len(units)
