"""Threads that share a patched model: each has a trace of its own, and none has another's rows in it."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import void_ext
from void_ext import PromptPlan, RefreshPlan
from void_ext.counters import PhaseCounters
from void_ext.patching import lengths
from void_ext.testing.compare import assert_bits_equal

THREADS = 4


def prompt(index: int) -> torch.Tensor:
    return torch.randint(3, 96, (1 + index % 2, 5 + index), generator=torch.Generator().manual_seed(index))


def answer(model: Any, index: int) -> torch.Tensor:
    ids = prompt(index)
    settings = {"max_new_tokens": 4 + index, "min_new_tokens": 4 + index, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)


class Turns:
    """A hook on a layer that makes threads wait for each other there: their forwards are inside one another."""

    def __init__(self, parties: int):
        self.barrier = threading.Barrier(parties)

    def __call__(self, module: Any, args: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):  # the others have fewer tokens to generate
            self.barrier.wait(20)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"mode": "exit", "alpha": 0.3}),
        ("llama", {"fuse": "norm", "halves": True}),
        ("gpt2", {"updates": True}),
        ("llama", {"mode": "skip", "policy": PromptPlan(budget=2, at_least=2)}),
        ("llama", {"mode": "skip", "policy": RefreshPlan(3, budget=2, at_least=2)}),
    ],
    ids=["trace", "exit", "fused norms", "hooks", "PromptPlan", "RefreshPlan"],
)
def test_each_has_its_own_trace(family: str, options: dict[str, Any], tiny: Any) -> None:
    model = tiny(family)
    expected, wanted, calls = [], [], 0
    layers = model.model.layers if family == "llama" else model.transformer.h
    layers[3].register_forward_pre_hook(lambda module, args: None)  # norms are not fused over a layer with a hook
    for index in range(THREADS):
        with void_ext.patch(copy.deepcopy(model), **copy.deepcopy(options)) as handle:
            expected.append(answer(handle._stack.model, index))
            wanted.append(handle.trace)
        calls += 0 if handle.counters is None else handle.counters.total.calls
    with void_ext.patch(model, **options) as handle:
        turns = Turns(THREADS)
        hook = layers[3].register_forward_pre_hook(turns)

        def run(index: int) -> tuple[torch.Tensor, Any]:
            try:
                return answer(model, index), handle.trace
            finally:
                turns.barrier.abort()  # nobody waits for a thread that is done

        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(run, range(THREADS)))
        hook.remove()
        if handle.counters is not None:
            assert handle.counters.total.calls == calls
    for index, (tokens, trace) in enumerate(found):
        assert torch.equal(tokens, expected[index])
        for phase in ("prompt", "response"):
            one, other = getattr(trace, phase), getattr(wanted[index], phase)
            assert one.positions == other.positions
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.mask, other.mask)
            assert torch.equal(one.executed, other.executed)
            assert_bits_equal(one.norms, other.norms, f"thread {index}, norms of the {phase}")
            if other.updates is not None:
                assert_bits_equal(one.updates, other.updates, f"thread {index}, updates of the {phase}")


@torch.no_grad()
def test_whose_trace_a_handle_shows(tiny: Any) -> None:
    """The asking thread's; to a thread that has none, the one begun last; nothing more once it was reset."""
    model = tiny("llama")

    def elsewhere(index: int) -> list[int]:
        def run() -> None:
            model(prompt(index))
            found.append(handle.trace.prompt.positions)

        found: list[list[int]] = []
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    with void_ext.patch(model) as handle:
        assert handle.trace is None
        assert elsewhere(0) == list(range(5))
        assert handle.trace.prompt.positions == list(range(5))
        assert elsewhere(1) == list(range(6))
        assert handle.trace.prompt.positions == list(range(6))
        model(prompt(2))
        assert elsewhere(3) == list(range(8))
        assert handle.trace.prompt.positions == list(range(7))
        handle.reset()
        assert handle.trace is None
        assert elsewhere(3) == list(range(8))
        assert handle.trace.prompt.positions == list(range(8))
    assert handle.trace.prompt.positions == list(range(8))


@torch.no_grad()
def test_whose_plan_a_handle_shows(tiny: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model, mode="skip", policy=PromptPlan(budget=2, at_least=2)) as handle:
        thread = threading.Thread(target=answer, args=(model, 0))
        thread.start()
        thread.join()
        assert not handle.plan.is_dense
        model(prompt(1))
        assert handle.plan.is_dense


def test_counters_are_added_to_by_one_thread_at_a_time(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []
    most: list[int] = []
    add = PhaseCounters.add

    def slow(self: PhaseCounters, other: PhaseCounters) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        add(self, other)
        inside.pop()

    model = tiny("llama")
    with void_ext.patch(model, mode="skip", policy=PromptPlan(budget=2, at_least=2)):
        monkeypatch.setattr(PhaseCounters, "add", slow)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(functools.partial(answer, model), range(THREADS)))
    assert set(most) == {1}


@torch.no_grad()
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_a_cache_that_goes_from_thread_to_thread(
    asked: bool, inference: bool, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths of caches are known to all threads: positions go on, in a trace of the thread that runs.

    ``asked`` False: as on a GPU, where a static cache is not asked for its length while nobody else wrote to it.
    """
    from transformers import StaticCache

    if not asked:
        monkeypatch.setattr(lengths, "_on_the_host", lambda cache: False)
    model = tiny("llama")
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = prompt(2)
    seen: list[list[int]] = []

    def step(tokens: torch.Tensor) -> None:
        with torch.inference_mode(inference):
            model(tokens, past_key_values=cache, use_cache=True)
        trace = handle.trace
        seen.append(trace.prompt.positions + trace.response.positions)

    with void_ext.patch(model) as handle, ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for thread, tokens in ((one, ids), (other, ids[:, :1]), (one, ids[:, :1])):
            thread.submit(step, tokens).result()
    assert seen == [list(range(7)), [7], [*range(7), 8]]  # each goes on with its own trace


def test_a_failure_stays_in_its_thread(tiny: Any) -> None:
    model = tiny("llama")
    expected = answer(model, 0)
    entered, failed = threading.Event(), threading.Event()

    def trap(module: Any, args: Any) -> None:
        if threading.current_thread().name == "fails":
            entered.set()
            raise RuntimeError("the machine is on fire")
        if not failed.is_set():
            entered.wait(20)
            failing.join(20)
            failed.set()

    def fail() -> None:
        with pytest.raises(RuntimeError, match="on fire"):
            answer(model, 1)

    with void_ext.patch(model) as handle:
        hook = model.model.layers[3].register_forward_pre_hook(trap)
        failing = threading.Thread(target=fail, name="fails")
        failing.start()
        assert torch.equal(answer(model, 0), expected)
        hook.remove()
    assert entered.is_set()
    assert handle.trace.response.tokens.tolist() == expected[:, 5:-1].tolist()
