"""What a search is asked for, what it takes at most, and what tells one from another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

import void_ext
from void_ext import _options
from void_ext._content import content_digest
from void_ext._fingerprint import Fingerprint
from void_ext._selection import Criterion, check_indices
from void_ext.search import greedy, units
from void_ext.search.greedy import Cost
from void_ext.search.prefix import check_searchable
from void_ext.search.text import Passage
from void_ext.search.units import Unit, units_of

BASELINES = 5  # four rankings and the last layers, beside the random ones


@dataclass(frozen=True)
class Settings:
    """What is searched.

    Attributes:
        budgets: whole layers to leave out, ascending; a plan is found for each.
        kinds: ``"layers"``, ``"halves"`` or both: what the greedy search lets go. Halves go until their weights reach
            those of the budget's layers.
        alpha: of the ranking by voids.
        shortlist: units that a step of the search measures, but for the first.
        exchange: at each budget, go on from the best plan known and try to exchange units: see
            :mod:`void_ext.search.greedy`.
        seeds: how many random plans.
        protect, protect_default: layers that always run, in every method but "last layers", whose plan is not chosen
            where some of them are among the last.
    """

    budgets: tuple[int, ...]
    kinds: tuple[str, ...] = ("layers",)
    alpha: float = 0.8
    shortlist: int = greedy.SHORTLIST
    exchange: bool = True
    seeds: int = 3
    protect: tuple[int, ...] = ()
    protect_default: bool = True

    def __post_init__(self) -> None:
        if not self.budgets or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in self.budgets):
            raise ValueError(f"budgets: expected whole numbers of layers >= 1, got {self.budgets!r}")
        object.__setattr__(self, "budgets", tuple(sorted(set(self.budgets))))
        if not self.kinds:
            raise ValueError(f"kinds: expected {' or '.join(units.KINDS)} or both, got none")
        for kind in self.kinds:
            _options.check_choice("kinds", kind, units.KINDS)
        _options.check_alpha(self.alpha)
        _options.check_flag("exchange", self.exchange)
        for name, least in (("shortlist", 1), ("seeds", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")
        object.__setattr__(self, "protect", check_indices("protect", self.protect))

    def protected(self, layers: int) -> tuple[int, ...]:
        """The layers that always run. Raises ValueError where the greatest budget does not fit beside them."""
        protected = Criterion(protect=self.protect, protect_default=self.protect_default).protected(layers)
        most, free = self.budgets[-1], layers - len(protected)
        if most > free:
            raise ValueError(
                f"budgets: expected at most {free} of {layers} layers ({len(protected)} are protected), got {most}"
            )
        return protected


@dataclass(frozen=True)
class Costs:
    """What a search takes at most, in layer evaluations over one text (a half counts 0.5), told before it begins.

    Attributes:
        trace: the traced pass that all rankings come from.
        dense: the streams that are kept to begin with, of both texts.
        plans: measuring the plans that are not searched, and the searched ones on the held-out text.
        searches: per kind of units the search itself.
        measured: plans measured, each with final norm and head over one text.
    """

    trace: int
    dense: int
    plans: float
    searches: dict[str, Cost]
    measured: float

    @property
    def total(self) -> float:
        return (
            self.trace + self.dense + self.plans + sum(cost.greedy + cost.exchange for cost in self.searches.values())
        )

    def to_dict(self) -> dict[str, Any]:
        searches = {
            kind: {
                "greedy": cost.greedy,
                "greedy_by_whole_passes": cost.whole_passes,
                "exchange": cost.exchange,
                "measured": cost.plans,
            }
            for kind, cost in self.searches.items()
        }
        return {
            "trace": self.trace,
            "dense": self.dense,
            "plans": self.plans,
            "searches": searches,
            "measured": self.measured,
            "total": self.total,
        }


def configuration_of(model: nn.Module, passages: tuple[Passage, Passage], settings: Settings) -> dict[str, Any]:
    """All that a measurement depends on, JSON-ready. Not budgets, kinds of units and exchange: a later run of the same
    search may ask for others and use what is measured."""
    fingerprint = Fingerprint.of(model)
    first = next(model.parameters())
    return {
        "void_ext": void_ext.__version__,
        "model_type": fingerprint.model_type,
        "model_norms": fingerprint.norms,
        "model_content": content_digest(model),
        "layers": fingerprint.layers,
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": first.device.type,
        "sequences": passages[0].ids.shape[0],
        "texts": {passage.role: passage.to_dict() for passage in passages},
        "alpha": settings.alpha,
        "shortlist": settings.shortlist,
        "seeds": settings.seeds,
        "protect": list(settings.protected(fingerprint.layers)),
    }


def searched_units(settings: Settings, fingerprint: Fingerprint) -> dict[str, tuple[Unit, ...]]:
    """What each kind of search may let go.

    Raises ValueError where all of it weighs less than the greatest budget: layers of many models weigh the same, those
    of some mixtures of experts do not.
    """
    protected = settings.protected(fingerprint.layers)
    found = {kind: units_of(kind, fingerprint.weights, protected) for kind in settings.kinds}
    for kind, candidates in found.items():
        if not greedy.reaches(candidates, settings.budgets[-1]):
            weight = math.floor(100 * sum(unit.weight for unit in candidates)) / 100
            raise ValueError(
                f"budgets: expected at most {weight:g} layers, the weight of all {kind} that are not protected, got "
                f"{settings.budgets[-1]}; take smaller budgets, protect fewer layers, or search whole layers alone"
            )
    return found


def costs_of(model: nn.Module, settings: Settings, sequences: int) -> Costs:
    """The bound on :func:`find_plans` over texts of so many sequences.

    Raises ValueError for a model that cannot be searched (UnsupportedModelError among them) and for budgets that do not
    fit it.
    """
    check_searchable(model)
    fingerprint = Fingerprint.of(model)
    layers = fingerprint.layers
    searches = {
        kind: greedy.most(candidates, layers, settings.budgets, settings.shortlist, settings.exchange, sequences)
        for kind, candidates in searched_units(settings, fingerprint).items()
    }
    others = BASELINES + settings.seeds
    kept = sum(layers - budget for budget in settings.budgets)
    # Where halves go, more of them may stay than of as many layers: every one of the lighter kind, at worst.
    searched = sum(kept if kind == "layers" else layers * len(settings.budgets) for kind in settings.kinds)
    searched *= 1 + settings.exchange
    count = len(settings.budgets)
    found = count * len(settings.kinds) * (1 + settings.exchange)
    measured = 2 + 2 * others * count + found + sum(cost.plans for cost in searches.values())
    again = layers * len(settings.kinds)  # to the streams that a search begins, or goes on, with
    return Costs(layers, 2 * layers + again, 2 * others * kept + searched, searches, measured)
