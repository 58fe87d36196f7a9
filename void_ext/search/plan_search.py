"""The whole of a search: rankings from one traced pass, baselines, greedy search, all of them measured on two texts.

Everything measured goes to a state file at once, so that an interrupted search goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from void_ext._fingerprint import Fingerprint
from void_ext.plan import VoidPlan
from void_ext.search.baselines import blind, rankings, trace_of
from void_ext.search.frontier import Frontier, Point
from void_ext.search.greedy import Greedy, Step
from void_ext.search.measure import Judge, Quality
from void_ext.search.prefix import Prefixes, PrefixRunner, check_searchable
from void_ext.search.settings import Settings, configuration_of, searched_units
from void_ext.search.state import State, key_of
from void_ext.search.text import Passage
from void_ext.search.units import Unit, halves_of, plan_of, size_of

#: progress(what, done, total)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        plans: for each budget the best plan measured that leaves protected layers alone, with the model's fingerprint.
        evaluations: layer evaluations done by this run of the search, by what they were for.
        steps: per kind of units the steps of the search.
        not_exchanged: per kind of units the budgets at which no exchange was tried though it was asked for: an earlier
            run of this search went straight on there, and its steps are kept.
    """

    frontier: Frontier
    plans: dict[int, VoidPlan]
    evaluations: dict[str, float]
    steps: dict[str, list[Step]]
    not_exchanged: dict[str, list[int]]


def find_plans(
    model: nn.Module,
    passages: tuple[Passage, Passage],
    settings: Settings,
    *,
    state_path: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Found:
    """For each budget the plan that changes the model's answers on the calibration text least, of all that are tried.

    Tried are: rankings by voids at alpha, ``|delta|``, relative update and cosine (block influence), from one traced
    pass; random and the last layers; and a greedy search that measures. All are compared by KL to the dense logits, so
    none of them is better on the calibration text than the plan returned, but for the last layers where protected ones
    are among them: those are only reported. So is the held-out text.

    Args:
        model: in eval mode, unpatched, of an architecture that ``patch(mode="skip")`` takes; left as it was.
        passages: calibration and held out, of as many sequences each, on the host.
        state_path: a JSON file that is written after every plan measured, and gone on from where it exists.

    Raises ValueError (UnsupportedModelError among them) for what cannot be searched, before anything is measured; and
    for a state file that is damaged or of another search. Interrupted, what is in the state file stays.

    Cost: at most :func:`void_ext.search.costs_of`, far less than whole passes: :mod:`void_ext.search.prefix`. Memory:
    (L + 1) T D numbers for each text (twice that for halves), and up to 1 GiB of the dense model's probabilities each.
    """
    check_searchable(model)
    configuration = configuration_of(model, passages, settings)
    units = searched_units(settings, Fingerprint.of(model))
    if state_path is not None and state_path.exists():
        state = State.load(state_path, configuration)
    else:
        state = State(configuration)
        if state_path is not None:
            state.save(state_path)
    return _Search(model, passages, settings, units, state, state_path, progress).run()


class _Search:
    def __init__(
        self,
        model: nn.Module,
        passages: tuple[Passage, Passage],
        settings: Settings,
        units: dict[str, tuple[Unit, ...]],
        state: State,
        path: Path | None,
        progress: Progress,
    ):
        self.model = model
        self.settings = settings
        self.units = units
        self.state = state
        self.path = path
        self.progress = progress
        self.fingerprint = Fingerprint.of(model)
        self.layers = self.fingerprint.layers
        self.protected = settings.protected(self.layers)
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.ids = {
            role: passage.ids.to(embeddings.weight.device)
            for role, passage in zip(("calibration", "held_out"), passages, strict=True)
        }
        self.evaluations: dict[str, float] = {}
        self.not_exchanged: dict[str, list[int]] = {}
        self.points: list[tuple[str, int, frozenset[int]]] = []
        self.texts: dict[str, tuple[Prefixes, Judge]] = {}

    def run(self) -> Found:
        budgets = set(self.settings.budgets)
        if not budgets <= {budget for _, budget, _ in self.state.rankings}:
            self._rank()
        with PrefixRunner(self.model) as self.runner:
            self.points = [found for found in self.state.rankings if found[1] in budgets]
            dense: frozenset[int] = frozenset()
            self._measure("held_out", [dense, *(off for _, _, off in self.points)])
            self._measure("calibration", [dense, *(off for _, _, off in self.points)])
            for kind in self.settings.kinds:
                self._search(kind)
            self._measure("held_out", [off for _, _, off in self.points])
        return self._found()

    def _rank(self) -> None:
        settings = self.settings
        self.progress("tracing the calibration text", 0, 0)
        traces = trace_of(self.model, self.ids["calibration"], settings.alpha)
        self._spent("trace", self.layers)
        rest = (settings.protect, settings.protect_default)
        # Those of other budgets stay: the state is the record of what the search has written plans for.
        others = [found for found in self.state.rankings if found[1] not in settings.budgets]
        self.state.rankings = [
            *others,
            *rankings(traces, settings.budgets, settings.alpha, *rest),
            *blind(self.layers, settings.budgets, settings.seeds, *rest),
        ]
        self._save()

    def _measure(self, role: str, offs: Sequence[frozenset[int]]) -> None:
        """The plans that are not measured yet on a text; several methods may have found one."""
        missing = [off for off in dict.fromkeys(offs) if key_of(role, off) not in self.state.measured]
        if not missing:
            return
        what = f"measuring {len(missing)} plan{'s' * (len(missing) != 1)}, {role.replace('_', '-')} text"
        self.progress(what, 0, len(missing))
        prefixes, judge = self._text(role)
        before = self.runner.launched
        for done, off in enumerate(missing):
            self.progress(what, done, len(missing))
            quality = judge.measure(prefixes.run(off))
            self.state.measured[key_of(role, off)] = quality
            self._save()
        self._spent("plans", self._since(before))

    def _search(self, kind: str) -> None:
        steps = self.state.steps.setdefault(kind, [])
        prefixes, judge = self._text("calibration")
        before = self.runner.launched
        search = Greedy(
            self.units[kind], prefixes, judge, self.settings.shortlist, steps, self.state.pending, self._save
        )
        self._spent("dense", self._since(before))
        done = 0  # of the steps: those of an earlier run are gone through again
        for budget in self.settings.budgets:
            what = f"searching {kind}, {budget} off"
            before = self.runner.launched
            while not done or not search.reached(budget, steps[done - 1].off):
                if done == len(steps):
                    search.step(budget, lambda count, total, what=what: self.progress(what, count, total))  # type: ignore[misc]
                    self._save()
                done += 1
            self._spent(f"greedy, {kind}", self._since(before))
            self._keep(f"greedy, {kind}", budget, steps[done - 1])
            # An earlier run without exchanges went straight on, or one that was not asked for this budget.
            passed = done < len(steps) and steps[done].how == "greedy"
            if passed and self.settings.exchange:
                self.not_exchanged.setdefault(kind, []).append(budget)
            if passed or (done == len(steps) and not self.settings.exchange):
                continue
            before = self.runner.launched
            if done == len(steps):
                better = self._better(search, budget)
                if better is not None:
                    search.take(better, self._quality("calibration", better))
                    self._save()
            if done < len(steps) and steps[done].how == "taken":
                done += 1
            if done == len(steps):
                what += ", exchanging"
                search.exchange(lambda count, total, what=what: self.progress(what, count, total))  # type: ignore[misc]
                self._save()
            done += 1
            self._spent(f"exchange, {kind}", self._since(before))
            self._keep(f"exchanged, {kind}", budget, steps[done - 1])

    def _keep(self, method: str, budget: int, step: Step) -> None:
        self.state.measured[key_of("calibration", step.off)] = step.quality
        self.points.append((method, budget, step.off))

    def _better(self, search: Greedy, budget: float) -> frozenset[int] | None:
        """The best plan measured for a budget, if it is better than the search's own and may be gone on from.

        It has to weigh as much as the budget in the search's own units: whole layers may be lighter than the mean.
        """
        every = halves_of(set(range(self.layers)) - set(self.protected))
        offs = [off for _, other, off in self.points if other == budget and off <= every]
        best = min(
            (off for off in offs if search.reached(budget, off)),
            key=lambda off: self._quality("calibration", off).divergence,
        )
        better = self._quality("calibration", best).divergence < search.steps[-1].quality.divergence
        return best if better else None

    def _text(self, role: str) -> tuple[Prefixes, Judge]:
        """The kept streams of a text, and a judge of others."""
        if role not in self.texts:
            before = self.runner.launched
            prefixes = Prefixes(self.runner, self.ids[role], 2 if "halves" in self.settings.kinds else 1)
            self.texts[role] = prefixes, Judge(self.runner, self.ids[role], prefixes.finals())
            self._spent("dense", self._since(before))
        return self.texts[role]

    def _since(self, launched: int) -> float:
        return (self.runner.launched - launched) / 2 / len(self.ids["calibration"])

    def _spent(self, what: str, evaluations: float) -> None:
        self.evaluations[what] = self.evaluations.get(what, 0.0) + evaluations

    def _save(self) -> None:
        if self.path is not None:
            self.state.save(self.path)

    def _quality(self, role: str, off: frozenset[int]) -> Quality:
        return self.state.measured[key_of(role, off)]

    def _found(self) -> Found:
        weights = self.fingerprint.weights
        protected = halves_of(self.protected)
        points = tuple(
            Point(
                method,
                budget,
                # Layers differ in weight in few models; a budget counts them all as one.
                len(off) / 2 if _whole_layers(off) else size_of(weights, off),
                off,
                self._quality("calibration", off),
                self._quality("held_out", off),
                not off.isdisjoint(protected),
            )
            for method, budget, off in self.points
        )
        dense: frozenset[int] = frozenset()
        frontier = Frontier(self._quality("calibration", dense), self._quality("held_out", dense), points)
        plans = {}
        texts = self.state.configuration["texts"]["calibration"]
        for budget in self.settings.budgets:
            best = frontier.best(budget)
            source = (
                f"void_ext.search: {best.method}, budget {budget} layers, KL {best.calibration.divergence:.4g} nats on "
                f"{math.prod(self.ids['calibration'].shape)} tokens of {texts['name']} (sha256 {texts['sha256']})"
            )
            plans[budget] = plan_of(best.off, self.layers, self.fingerprint, source)
        return Found(frontier, plans, self.evaluations, self.state.steps, self.not_exchanged)


def _whole_layers(off: frozenset[int]) -> bool:
    return off == halves_of({half // 2 for half in off})
