"""What a captured CUDA graph needs of a patch, as far as it shows without a GPU; python_tests/gpu has the graphs."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import void_ext
from void_ext.patching import captured
from void_ext.patching.call import Call
from void_ext.patching.schedule import NONE, SOME, Schedule
from void_ext.store import TraceStore


def write(store: TraceStore, start: int, length: int) -> None:
    norms = torch.ones(store.batch, length, store.layers + 1)
    store.write(start, length, [1] * length, 0, {"norms": norms}, None, None)


@torch.no_grad()
def test_the_traces_tables_live_as_long_as_the_model(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    ids = torch.arange(8)[None]
    handle = void_ext.patch(model)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    tables = [weakref.ref(table) for table in handle._recorders.own.store.tables]
    with monkeypatch.context() as patch:
        patch.setattr(Call, "captured", True)
        model(ids[:, :1], past_key_values=cache)
    handle.reset()
    void_ext.unpatch(model)
    gc.collect()
    assert all(table() is not None for table in tables)
    count = len(captured._kept)
    del model, handle, cache
    gc.collect()
    assert all(table() is None for table in tables)
    assert len(captured._kept) == count - 1


def test_a_captured_call_finds_room_after_one_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TraceStore(2, 3, torch.device("cpu"))
    for start, length in ((0, 63), (63, 1), (64, 1)):
        write(store, start, length)
        assert store.capacity >= start + 2 * length
    write(store, 65, 61)
    tables = store.tables
    monkeypatch.setattr("void_ext.store.capturing", lambda device: True)
    write(store, 126, store.capacity - 126)
    assert all(now is before for now, before in zip(store.tables, tables, strict=True))
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured, and the trace has no room for position"):
        write(store, store.capacity, 1)


def test_masks_are_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([[True, False], [False, False]])
    schedule = Schedule([SOME, NONE], [SOME, NONE], rows, rows)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="this plan has not been on cuda:0 yet for 2 rows of 3 tokens"):
        schedule.masks(torch.device("cuda", 0), 2, 3)
    schedule = Schedule([NONE, NONE], [NONE, NONE])
    with pytest.raises(RuntimeError, match="this plan has not been on cuda:0 yet"):
        schedule.executed(torch.device("cuda", 0), 2, 3)


def test_masks_of_several_sizes_are_kept() -> None:
    rows = torch.tensor([[True, False], [False, False]])
    schedule = Schedule([SOME, NONE], [SOME, NONE], rows, rows)
    cpu = torch.device("cpu")
    first = schedule.masks(cpu, 2, 1)
    for length in range(2, 9):
        schedule.masks(cpu, 2, length)
    assert schedule.masks(cpu, 2, 1) is first
    assert any(mask is first[0] for mask in schedule.on_device())
    schedule.masks(cpu, 2, 9)
    assert len(schedule.on_device()) == 16
