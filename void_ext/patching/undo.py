"""Changes to live objects that know how to undo themselves."""

from __future__ import annotations

from typing import Any, Protocol


class Undo(Protocol):
    def remove(self) -> None: ...


class InstanceAttribute:
    """Sets ``name`` on one instance; ``remove`` restores the instance's own value, or its absence.

    Where somebody else has replaced our value since, theirs stays: what it wraps is inert once unpatched. accelerate
    moves a ``forward`` to ``_old_forward`` and back: ours gives way to the class's own there, as it would have it.

    Works on the instance's ``__dict__``, so that neither a class nor torch's module bookkeeping is touched.
    """

    def __init__(self, owner: Any, name: str, value: Any):
        self._owner = owner
        self._name = name
        self._had = name in owner.__dict__
        self._before = owner.__dict__.get(name)
        self._value = value
        owner.__dict__[name] = value

    def remove(self) -> None:
        if self._owner.__dict__.get(self._name) is not self._value:
            for name in ("forward", "_old_forward"):
                if self._owner.__dict__.get(name) is self._value:
                    own = type(self._owner).forward.__get__(self._owner)
                    self._owner.__dict__[name] = self._before if self._had else own
            return
        if self._had:
            self._owner.__dict__[self._name] = self._before
        else:
            self._owner.__dict__.pop(self._name, None)


def remove_all(changes: list[Undo]) -> None:
    """Undo in reverse order, all of them, also when one fails."""
    first: BaseException | None = None
    while changes:
        try:
            changes.pop().remove()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first
