"""What happens to each half of each layer in one phase: the tables that plans are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast


class Action(IntEnum):
    """What happens to one half of a layer."""

    SKIP = 0  #: nothing at all; of an attention half no later token of the row may want anything
    PROJECT = 1  #: attention only: its keys and values for the cache, and nothing else
    RUN = 2  #: everything


_ALLOWED = {"attention": (Action.SKIP, Action.PROJECT, Action.RUN), "mlp": (Action.SKIP, Action.RUN)}
_Row = tuple[Action, ...]


@dataclass(frozen=True, repr=False)
class PhasePlan:
    """What runs in one phase.

    Attributes:
        attention: an :class:`Action` for each layer, ``[L]``; or for each row and layer, ``[B][L]``.
        mlp: RUN or SKIP, of the same shape.

    Sequences are taken and kept as tuples. Raises TypeError or ValueError for anything that is not such a table.
    """

    attention: _Row | tuple[_Row, ...]
    mlp: _Row | tuple[_Row, ...]

    def __post_init__(self) -> None:
        for name in ("attention", "mlp"):
            object.__setattr__(self, name, _table(name, getattr(self, name)))
        ours, theirs = _shape(self.attention), _shape(self.mlp)
        if ours != theirs:
            raise ValueError(f"mlp: expected the shape of attention, {list(ours)}, got {list(theirs)}")

    def __repr__(self) -> str:
        if self.rows is not None:
            return f"PhasePlan(rows={self.rows}, layers={self.layers}, skipped={self.skipped:g})"
        strips = ("".join(".PS"[Action.RUN - action] for action in row) for row in self.table()[0])
        return "PhasePlan(attention={!r}, mlp={!r})".format(*strips)

    @classmethod
    def dense(cls, layers: int) -> PhasePlan:
        """Everything runs."""
        return cls((Action.RUN,) * layers, (Action.RUN,) * layers)

    @property
    def rows(self) -> int | None:
        """How many rows the plan tells apart; None: one plan for all, however many there are."""
        shape = _shape(self.attention)
        return shape[0] if len(shape) == 2 else None

    @property
    def layers(self) -> int:
        return _shape(self.attention)[-1]

    @property
    def skipped(self) -> float:
        """Layers skipped, a half (attention that does not RUN, an MLP that does not) as 0.5; the mean over rows."""
        table = self.table()
        return sum(action != Action.RUN for row in table for half in row for action in half) / (2 * len(table))

    @property
    def is_dense(self) -> bool:
        return self.skipped == 0

    def collapse(self) -> PhasePlan:
        """One plan for all rows, where they are all the same; else the plan as it is."""
        table = self.table()
        return self if self.rows is None or any(row != table[0] for row in table) else PhasePlan(*table[0])

    def row(self, index: int) -> PhasePlan:
        """The plan of one row; IndexError where there is no such row."""
        if self.rows is None:
            return self
        return PhasePlan(*self.table()[self._row_index(index)])

    def select_rows(self, indices: Sequence[int]) -> PhasePlan:
        """The plan of these rows, in this order; a row may come twice (beams) or not at all (it ended)."""
        if self.rows is None:
            return self
        table = [self.table()[self._row_index(index)] for index in indices]
        if not table:
            raise ValueError("indices: expected at least one row, got none")
        return PhasePlan(tuple(row[0] for row in table), tuple(row[1] for row in table))

    def _row_index(self, index: int) -> int:
        if not 0 <= index < (self.rows or 0):
            raise IndexError(f"row: expected one of 0 … {(self.rows or 0) - 1}, got {index}")
        return index

    def table(self) -> list[tuple[_Row, _Row]]:
        """Attention and mlp of each row that the plan tells apart."""
        if self.rows is None:
            return [(cast(_Row, self.attention), cast(_Row, self.mlp))]
        return list(zip(cast("tuple[_Row, ...]", self.attention), cast("tuple[_Row, ...]", self.mlp), strict=True))


def _shape(table: Sequence[Any]) -> tuple[int, ...]:
    return (len(table), len(table[0])) if isinstance(table[0], tuple) else (len(table),)


def _table(name: str, value: Any) -> _Row | tuple[_Row, ...]:
    if not _is_list(value) or not value:
        raise TypeError(f"{name}: expected a list of actions, or one for each row, got {value!r}")
    if not _is_list(value[0]):
        return tuple(_action(f"{name}[{layer}]", name, given) for layer, given in enumerate(value))
    if any(not _is_list(row) or len(row) != len(value[0]) or not row for row in value):
        raise ValueError(f"{name}: expected rows of actions, all for the same number of layers")
    return tuple(
        tuple(_action(f"{name}[{row}][{layer}]", name, given) for layer, given in enumerate(actions))
        for row, actions in enumerate(value)
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _action(where: str, half: str, value: Any) -> Action:
    # True is 1 to Python, and so would mean PROJECT.
    if isinstance(value, int) and not isinstance(value, bool) and value in _ALLOWED[half]:
        return Action(value)
    raise ValueError(f"{where}: expected one of {', '.join(action.name for action in _ALLOWED[half])}, got {value!r}")
