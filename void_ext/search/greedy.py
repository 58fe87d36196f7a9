"""Greedy search: leave out what hurts least, one unit after the other, each measured by KL to the dense logits.

The first step measures every unit. A later one measures those alone whose last measured damage was the smallest (the
shortlist): damage is relative, and changes slowly as layers go. Each measurement runs what comes behind the unit, on a
third of the sequences first (the screen); the most promising units are measured on all of them, and one of those goes.

What goes early may be wrong for what goes later. So at each budget the search may go on from a better plan found
elsewhere, and tries to exchange each unit that has gone for one of the shortlist: screened and measured likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from void_ext.search.measure import Judge, Quality
from void_ext.search.prefix import Prefixes, launches
from void_ext.search.units import Unit

SHORTLIST = 8
#: The screen is every third sequence; these many of the best are measured on all.
SCREEN = 3
FINALISTS = 3
_ROUNDING = 1e-9
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Step:
    """A plan that the search went on from.

    Attributes:
        how: ``"greedy"``: one more unit went; ``"taken"``: a better plan of the same budget, from elsewhere;
            ``"exchange"``: some unit came back for another, or none did.
        off: the halves off.
        quality: on the calibration text.
        damages: what a greedy step's screen showed: the growth of the mean KL per layer's weight, by unit.
    """

    how: str
    off: frozenset[int]
    quality: Quality
    damages: dict[str, float] = field(default_factory=dict)


@dataclass
class Greedy:
    """A search, from whose steps it can go on.

    Args:
        units: what may go.
        prefixes, judge: of the calibration text; the prefixes follow the search.
        shortlist: how many units a later step measures.
        steps: those taken so far.
        pending: what the step under way has measured so far, by :func:`pending_key`; emptied when it is taken.
        measured: called after each plan measured.

    Raises ValueError for steps that no search over these units takes.
    """

    units: Sequence[Unit]
    prefixes: Prefixes
    judge: Judge
    shortlist: int = SHORTLIST
    steps: list[Step] = field(default_factory=list)
    pending: dict[str, Quality] = field(default_factory=dict)
    measured: Callable[[], None] = lambda: None
    _damages: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {unit.name for unit in self.units}
        every = frozenset(half for unit in self.units for half in unit.halves)
        for step in self.steps:
            if not step.damages.keys() <= names or not step.off <= every:
                raise ValueError(f"steps: expected units of this model, got {sorted(step.off)}")
            self._damages |= step.damages
        if self.steps and self._damages.keys() != names:
            raise ValueError("steps: expected a first one that measured every unit")
        if self.prefixes.off != self.off:
            self.prefixes.adopt(self.off)

    @property
    def off(self) -> frozenset[int]:
        """The halves that have gone."""
        return self.steps[-1].off if self.steps else frozenset()

    @property
    def gone(self) -> list[Unit]:
        off = self.off
        return [unit for unit in self.units if unit.halves <= off]

    @property
    def left(self) -> list[Unit]:
        off = self.off
        return [unit for unit in self.units if not unit.halves <= off]

    def size(self, off: frozenset[int]) -> float:
        """Of the units among these halves, in layers."""
        return sum(unit.weight for unit in self.units if unit.halves <= off)

    def reached(self, budget: float, off: frozenset[int]) -> bool:
        # Weights of halves are fractions: their sum may miss the budget by a rounding.
        return self.size(off) >= budget - _ROUNDING

    def step(self, budget: float, report: Report = lambda done, total: None) -> Step:
        """Let one more unit go on the way to ``budget``. Interrupted, it goes on from what it has measured.

        Where less than a unit's weight is missing, the unit is judged by what is missing.
        """
        off, need = self.off, budget - self.size(self.off)
        candidates = self._promising(self.left) if self.steps else self.left
        some = screen(len(self.prefixes.ids))
        before = self.steps[-1].quality.part(some).divergence if self.steps else 0.0
        useful: dict[str, float] = {}
        damages: dict[str, float] = {}
        for done, unit in enumerate(candidates):
            report(done, len(candidates) + FINALISTS)
            grown = self._measure(off | unit.halves, some).divergence - before
            damages[unit.name] = grown / unit.weight
            useful[unit.name] = grown / min(unit.weight, need)
        before = self.steps[-1].quality.divergence if self.steps else 0.0
        found: list[tuple[float, Unit, Quality]] = []
        for done, unit in enumerate(sorted(candidates, key=lambda unit: useful[unit.name])[:FINALISTS]):
            report(len(candidates) + done, len(candidates) + FINALISTS)
            quality = self._measure(off | unit.halves)
            found.append(((quality.divergence - before) / min(unit.weight, need), unit, quality))
        _, best, quality = min(found, key=lambda entry: entry[0])
        return self._go_on(Step("greedy", off | best.halves, quality, damages))

    def take(self, off: frozenset[int], quality: Quality) -> Step:
        """Go on from another plan, of the budget just reached."""
        return self._go_on(Step("taken", off, quality))

    def exchange(self, report: Report = lambda done, total: None) -> Step:
        """Try every exchange of a unit that has gone for one of the shortlist of its weight; take the best, if any."""
        now = self.steps[-1]
        some = screen(len(self.prefixes.ids))
        swaps = list(self._swaps())
        screened: list[tuple[float, frozenset[int]]] = []
        for done, off in enumerate(swaps):
            report(done, len(swaps) + FINALISTS)
            quality = self._measure(off, some)
            screened.append((quality.divergence, off))
        limit = now.quality.part(some).divergence
        best, chosen = now.off, now.quality
        for done, (divergence, off) in enumerate(sorted(screened, key=lambda pair: pair[0])[:FINALISTS]):
            report(len(swaps) + done, len(swaps) + FINALISTS)
            if divergence < limit:
                quality = self._measure(off)
                if quality.divergence < chosen.divergence:
                    best, chosen = off, quality
        return self._go_on(Step("exchange", best, chosen))

    def _measure(self, off: frozenset[int], sequences: range | None = None) -> Quality:
        key = pending_key(off, sequences is None)
        if key not in self.pending:
            self.pending[key] = self.judge.measure(self.prefixes.run(off, sequences), sequences)
            self.measured()
        return self.pending[key]

    def _swaps(self) -> Iterable[frozenset[int]]:
        left = self.left
        for gone in self.gone:
            for unit in self._promising([one for one in left if abs(one.weight - gone.weight) < _ROUNDING]):
                yield (self.off - gone.halves) | unit.halves

    def _promising(self, units: Iterable[Unit]) -> list[Unit]:
        return sorted(units, key=lambda unit: self._damages[unit.name])[: self.shortlist]

    def _go_on(self, step: Step) -> Step:
        self.prefixes.adopt(step.off)
        self._damages |= step.damages
        self.steps.append(step)
        self.pending.clear()
        return step


def screen(sequences: int) -> range:
    """The sequences that exchanges are tried on first."""
    return range(0, sequences, SCREEN)


def pending_key(off: Iterable[int], whole: bool) -> str:
    """``"all/2 3"``: halves off, on all sequences; ``"some/2 3"``: on those of :func:`screen`."""
    return f"{'all' if whole else 'some'}/{' '.join(map(str, sorted(off)))}"


@dataclass(frozen=True)
class Cost:
    """What a search takes at most, told before it begins.

    Attributes:
        greedy: layer evaluations of the greedy steps: one layer over the whole calibration text, a half of one counts
            0.5, a part of the sequences its share.
        whole_passes: the same for steps that measure every unit left, each by a whole pass.
        exchange: layer evaluations of the exchanges and of going on from other plans.
        plans: how many plans are measured, each with final norm and head over the whole text.
    """

    greedy: float
    whole_passes: float
    exchange: float
    plans: float


def most(
    units: Sequence[Unit], layers: int, budgets: Sequence[float], shortlist: int, exchange: bool, sequences: int
) -> Cost:
    """The bound on a :class:`Greedy` through these budgets: each step lets go of the lightest, each run is the longest.

    On the way to a budget at least the heaviest units that reach the one before have gone, whatever was exchanged.
    """
    ordered = sorted(units, key=lambda unit: min(unit.halves))
    share = len(screen(sequences)) / sequences
    halves, plans, whole = 0.0, 0.0, 0
    for before, budget in zip((0.0, *budgets), budgets, strict=False):
        for step in range(_steps(units, budget - before)):
            # Those that have gone are the last ones: then each candidate's run is as long as it can be.
            left = ordered[: len(ordered) - _fewest(units, before) - step]
            gone = frozenset(half for unit in ordered[len(left) :] for half in unit.halves)
            measured = left if plans == 0 else left[:shortlist]
            runs = [launches(gone | unit.halves, min(unit.halves), layers) for unit in measured]
            plans += share * len(runs) + len(runs[:FINALISTS])
            # The last of these: the streams behind what goes, anew.
            halves += share * sum(runs) + sum(runs[:FINALISTS]) + sum(runs[:1])
            whole += sum(2 * layers - len(gone) - len(unit.halves) for unit in left)
    swapped, tried = 0.0, 0.0
    for budget in budgets if exchange else ():
        runs_of_swaps = share * _steps(units, budget) * shortlist + FINALISTS
        stays = layers - _fewest(units, budget) * len(units[0].halves) / 2
        tried += runs_of_swaps
        swapped += (runs_of_swaps + 2) * stays
    return Cost(halves / 2, whole / 2, swapped, plans + tried)


def reaches(units: Sequence[Unit], budget: float) -> bool:
    """Whether all of the units together weigh as much as ``budget``."""
    return sum(unit.weight for unit in units) >= budget - _ROUNDING


def _steps(units: Sequence[Unit], budget: float) -> int:
    """How many units reach ``budget`` at most."""
    return _count(sorted(unit.weight for unit in units), budget)


def _fewest(units: Sequence[Unit], budget: float) -> int:
    """How many units reach ``budget`` at least."""
    return _count(sorted((unit.weight for unit in units), reverse=True), budget)


def _count(weights: Sequence[float], budget: float) -> int:
    """How many of these weights, one after the other, reach ``budget``."""
    size = 0.0
    for count, weight in enumerate(weights):
        if size >= budget - _ROUNDING:
            return count
        size += weight
    return len(weights)
