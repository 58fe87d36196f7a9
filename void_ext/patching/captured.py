"""What a CUDA graph that was captured around a patched model's forward goes on reading and writing with each replay.

A graph keeps the memory that was allocated while it was captured. What was there before - the trace's tables, a plan's
masks - is the patch's, which would give it back with the next trace or plan, and replays would write to somebody else's
memory. So it is kept here as long as the model lives, without whose weights no graph of it can be replayed either.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from void_ext.patching.recorder import Recorder

_kept: WeakKeyDictionary[nn.Module, dict[int, Tensor]] = WeakKeyDictionary()


def commit_captured(recorder: Recorder, body: nn.Module, output: Any) -> None:
    """Close the call of ``body`` that is open and was captured, and keep what was there before it."""
    call, store = recorder.call, recorder.store
    before = [] if store is None else store.tables
    recorder.commit(output)
    used = before if recorder.store is store else []  # a new trace was begun inside of the graph
    if call is not None and call.schedule is not None:
        used = [*used, *call.schedule.on_device()]
    _kept.setdefault(body, {}).update((id(tensor), tensor) for tensor in used)
