"""How many layers a plan or a policy may skip and which it must leave alone, checked where the user says so."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from void_ext import _options

SIGNALS = ("delta", "abs_delta", "relative_update", "cosine")
#: Signals computed from ``||h_{l+1} - h_l||``, which is traced on request only.
UPDATE_SIGNALS = ("relative_update", "cosine")


def check_indices(name: str, value: Iterable[int], layers: int | None = None) -> tuple[int, ...]:
    """``value`` as sorted layer indices; each >= 0, below ``layers`` where that is known, none of them twice."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list of layer indices, got {type(value).__name__} {value!r}")
    found: set[int] = set()
    for given in value:
        index = _index(name, given)
        if index < 0:
            raise ValueError(f"{name}: expected layer indices >= 0 (none counts from the end), got {index}")
        if layers is not None and index >= layers:
            raise ValueError(f"{name}: expected layer indices below {layers}, got {index}")
        if index in found:
            raise ValueError(f"{name}: expected each layer once, got {index} twice")
        found.add(index)
    return tuple(sorted(found))


def _index(name: str, value: Any) -> int:
    # True is an int to Python, and so is a bool tensor without dimensions: a mask of layers is no list of indices.
    if not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected layer indices (ints), got {type(value).__name__} {value!r}")


def check_count(name: str, value: float | None) -> float | None:
    """``value`` as a number of layers >= 0, a half of a layer being 0.5; None stays None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number of layers >= 0 or None, got {type(value).__name__} {value!r}")
    if not 0 <= value < math.inf:  # also False for NaN
        raise ValueError(f"{name}: expected a number of layers >= 0 or None, got {value}")
    return float(value)


@dataclass(frozen=True)
class Criterion:
    """What layers are ranked by, and between which bounds they are taken.

    Attributes:
        signal: ``"delta"`` ranks by the share of tokens for which a layer was a void; ``"abs_delta"``,
            ``"relative_update"`` and ``"cosine"`` by a mean over tokens and know no voids, so they need a budget.
        alpha: the threshold's factor, for ``"delta"``.
        budget: at most so many layers are skipped, a half as 0.5.
        at_least: at least so many are.
        protect: layers that always run, beside the default ones.
        protect_default: the first two layers and the last one are protected.
    """

    signal: str = "delta"
    alpha: float = 0.8
    budget: float | None = None
    at_least: float | None = None
    protect: Iterable[int] = ()  # a sorted tuple from then on
    protect_default: bool = True

    def __post_init__(self) -> None:
        _options.check_choice("signal", self.signal, SIGNALS)
        checked = {
            "alpha": _options.check_alpha(self.alpha),
            "budget": check_count("budget", self.budget),
            "at_least": check_count("at_least", self.at_least),
            "protect": check_indices("protect", self.protect),
            "protect_default": _options.check_flag("protect_default", self.protect_default),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.signal != "delta" and self.budget is None:
            raise ValueError(
                f"budget: expected the number of layers to skip with signal {self.signal!r}, which ranks layers but "
                "has no threshold, got None"
            )
        if self.budget is not None and self.at_least is not None and self.at_least > self.budget:
            raise ValueError(f"at_least: expected at most the budget {self.budget:g}, got {self.at_least:g}")

    @property
    def needs_updates(self) -> bool:
        return self.signal in UPDATE_SIGNALS

    def protected(self, layers: int) -> tuple[int, ...]:
        """The layers of a model with ``layers`` layers that must run."""
        default = {0, 1, layers - 1} if self.protect_default else set()
        named = check_indices("protect", self.protect, layers)
        return tuple(sorted(index for index in default | set(named) if 0 <= index < layers))

    def limits(self, layers: int, parts: int = 1) -> tuple[int | None, int]:
        """At most and at least how many parts to skip, where each layer has ``parts`` parts (2: halves)."""
        free = parts * (layers - len(self.protected(layers)))
        most = None if self.budget is None else math.floor(parts * self.budget)
        least = 0 if self.at_least is None else math.ceil(parts * self.at_least)
        if most is not None and least > most:
            raise ValueError(
                f"at_least: expected a {'half' if parts == 2 else 'whole number'} of layers between {self.at_least:g} "
                f"and the budget {self.budget:g}, found none"
            )
        if least > free:
            raise ValueError(
                f"at_least: expected at most {free / parts:g} of {layers} layers ({layers - free // parts} are "
                f"protected), got {self.at_least:g}"
            )
        return most, least
