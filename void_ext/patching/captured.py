"""What a CUDA graph that was captured around a patched model's forward goes on writing to, with each replay.

A graph keeps the memory that was allocated while it was captured. What was there before - the trace's tables, a plan's
masks - is the patch's, which would give it back with the next trace or plan, and replays would write to somebody else's
memory. So it is kept here as long as the model lives, without whose weights no graph of it can be replayed either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_kept: WeakKeyDictionary[nn.Module, dict[int, Any]] = WeakKeyDictionary()


def keep(body: nn.Module, things: Iterable[Any]) -> None:
    """Keep ``things``, which a forward of ``body`` used while it was captured."""
    _kept.setdefault(body, {}).update((id(thing), thing) for thing in things)
