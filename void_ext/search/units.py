"""What a search may leave out: whole layers, or their halves, and how much of the model each is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from void_ext._fingerprint import Fingerprint, Weights
from void_ext.plan import Action, VoidPlan, plan_of_sets

KINDS = ("layers", "halves")


@dataclass(frozen=True)
class Unit:
    """A part that goes as a whole.

    Attributes:
        name: ``"17"`` for a layer, ``"17a"`` for its attention, ``"17m"`` for its MLP.
        halves: of the model, counted 2l (attention of layer l) and 2l + 1 (its MLP).
        weight: in layers: 1 for a whole one; of a half its weights over those of the model's mean layer.
    """

    name: str
    halves: frozenset[int]
    weight: float


def units_of(kind: str, weights: Weights, protected: Iterable[int]) -> tuple[Unit, ...]:
    """The units of a model, in its order, without those of the layers that always run."""
    kept = set(protected)
    layers = [layer for layer in range(len(weights.mlp)) if layer not in kept]
    if kind == "layers":
        return tuple(Unit(str(layer), frozenset((2 * layer, 2 * layer + 1)), 1.0) for layer in layers)
    return tuple(
        Unit(f"{layer}{'am'[part]}", frozenset((2 * layer + part,)), half_weight(weights, 2 * layer + part))
        for layer in layers
        for part in (0, 1)
    )


def half_weight(weights: Weights, half: int) -> float:
    """A half's weights over those of the mean layer."""
    size = (weights.attention, weights.mlp)[half % 2][half // 2]
    return size / _mean_layer(weights)


def size_of(weights: Weights, off: Iterable[int]) -> float:
    """The weights of these halves over those of the mean layer: the budget that a plan uses up."""
    return sum((weights.attention, weights.mlp)[half % 2][half // 2] for half in off) / _mean_layer(weights)


def _mean_layer(weights: Weights) -> float:
    return (sum(weights.attention) + sum(weights.mlp)) / len(weights.mlp)


def halves_of(layers: Iterable[int]) -> frozenset[int]:
    """Both halves of these layers."""
    return frozenset(half for layer in layers for half in (2 * layer, 2 * layer + 1))


def off_of(plan: VoidPlan) -> frozenset[int]:
    """The halves that a plan, the same for all rows, goes without in the response."""
    attention, mlp = plan.response.table()[0]
    return frozenset(
        2 * layer + part
        for part, actions in enumerate((attention, mlp))
        for layer, action in enumerate(actions)
        if action != Action.RUN
    )


def plan_of(off: Iterable[int], layers: int, fingerprint: Fingerprint | None, source: str) -> VoidPlan:
    """The plan that SKIPs these halves in both phases."""
    sets: list[set[int]] = [set(), set()]
    for half in off:
        sets[half % 2].add(half // 2)
    frozen = [frozenset(one) for one in sets]
    return plan_of_sets(layers, frozen, frozen, fingerprint=fingerprint, source=source)


def named(off: Iterable[int]) -> str:
    """``"9, 14a, 17m"``: whole layers by number, halves with their letter."""
    gone = set(off)
    words: Sequence[str] = [
        str(half // 2) if half ^ 1 in gone else f"{half // 2}{'am'[half % 2]}"
        for half in sorted(gone)
        if half % 2 == 0 or half ^ 1 not in gone
    ]
    return ", ".join(words)
