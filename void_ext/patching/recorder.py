"""What happens around a forward of a patched model: where its rows belong, and their way into the trace.

The body's hooks open and close a `Call`; closing appends its table to the trace. Positions, phases and cache lengths
are counted here, on the host: nothing asks the device. Threads that share a model have a call and a trace each.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from void_ext.patching import ledger
from void_ext.patching.call import Call, Tables
from void_ext.patching.lengths import CacheLengths, address_of, cache_of, weakly_referable
from void_ext.patching.recording import Recording
from void_ext.patching.running import Generation
from void_ext.patching.schedule import ALL, Schedule
from void_ext.patching.skipping import Skipper
from void_ext.store import PHASES, PROMPT, RESPONSE, TraceStore


@dataclass
class Shared:
    """What the threads that use one patched model have in common.

    Attributes:
        lengths: of the caches that were seen.
        newest: the trace that was begun last, in whichever thread, and what skipped there.
        used: a thread has a recorder already.
    """

    lengths: CacheLengths = field(default_factory=CacheLengths)
    newest: tuple[TraceStore, Skipper | None] | None = None
    used: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Copying or saving a patched model copies the patch, not what it has recorded.
        return Shared, ()


class Recorders(threading.local):
    """The recorder of each thread: one that comes for the first time runs ``__init__`` with the same arguments."""

    def __init__(self, recording: Recording, skipper: Skipper | None, shared: Shared):
        if shared.used and skipper is not None:
            skipper = skipper.twin()
        shared.used = True
        self.own = Recorder(recording, skipper, shared)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorders, (self.own.recording, self.own.skipper, self.own.shared)


@dataclass
class Recorder:
    """Keeps the current call, the current trace and how long each cache is."""

    recording: Recording
    skipper: Skipper | None  # mode "skip" only
    shared: Shared
    call: Call | None = None
    store: TraceStore | None = None
    generation: Generation | None = None
    forced_phase: int | None = None
    real_tokens: Tensor | None = None  # [B, T], for calls that come without an attention mask
    paused: bool = False
    _calls: int = 0
    _tables: dict[torch.device, Tables] = field(default_factory=dict)  # of the last call, for the next
    _start: int = 0
    _tokens: Any = None  # of the current call
    _phases: Sequence[int] = ()  # of its positions
    _into: Any = None  # the cache it was given
    _new_trace: bool = False
    _cache: Any = None
    _rows: int | None = None  # where the keys of that cache were when it was last written to
    _foreign: bool = False

    # ---- around a forward ----

    def begin(
        self,
        arguments: dict[str, Any],
        attentions: bool = False,
        kind: type[Call] = Call,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """The body is about to run with these (keyword) arguments; ``kind`` is what records it, with its settings.

        ``attentions`` says that their weights are wanted.
        """
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        given = ids if ids is not None else embeds
        if given is None:
            raise RuntimeError("void_ext: the model was called with neither input_ids nor inputs_embeds")
        batch, length = given.shape[:2]
        # gpt_neox calls its cache layer_past inside, but its body does not.
        cache = ledger.cache_in(arguments)
        mask = arguments.get("attention_mask")
        if mask is None and self.real_tokens is not None and self.real_tokens.shape == (batch, length):
            mask = self.real_tokens.to(given.device)
        generation = self.generation
        # A processor or a criterion may run the model for itself inside of generate(); such a forward has no rows.
        self._foreign = generation is not None and not (generation.expected or generation.wrapped)
        if self._foreign:
            self._start = self.shared.lengths.of(cache)
        else:
            self._place(cache, batch, length)
        if generation is not None and not self._foreign:
            generation.expected = False
            if generation.wrapped:
                generation.take(self._start + length)
            if generation.mask is not None and generation.mask.shape[0] == batch:
                mask = generation.mask
            if ids is None and generation.tokens is not None and generation.tokens.shape == (batch, length):
                ids = generation.tokens  # the wrapper has embedded them itself (vision-language models)
        real = _real_columns(mask, self._start, length)
        if generation is not None and generation.ended is not None and generation.ended.shape[0] == batch:
            going_on = ~generation.ended[:, None].to(given.device)
            known = min(generation.offset + generation.length - 1 - self._start, length)
            if known > 0 and self.store is not None and not self._new_trace:
                # Without a cache tokens run again: what they were they stay, a row ends with those that are new.
                earlier = self.store.view("mask")[:, self._start : self._start + known].to(given.device)
                going_on = torch.cat([earlier, going_on.expand(batch, length - earlier.shape[1])], 1)
            real = going_on.expand(batch, length) if real is None else real & going_on
        self._phases = self._phases_of(self._start, length)
        schedule = None if self.skipper is None else self._schedule(self.skipper, batch, cache is not None)
        if schedule is not None and attentions and set(schedule.attention) != {ALL}:
            raise ValueError(
                "output_attentions: expected False where the plan leaves out attentions, got True: there would be no "
                "entry for layers that do not run. The trace tells which ran; mode='trace' gives all attentions"
            )
        if kind.compiled and self.skipper is not None and schedule is not None:
            self.skipper.check_compiled(schedule)
        counters = None
        guard = ledger.guard_of(cache)
        # Where nothing is skipped it is asked for each new cache alone, whether it is of a kind that could be.
        new = self._new_trace or self._foreign
        if guard is not None or (schedule is not None and (new or not schedule.whole)):
            ledger.admit(cache, range(self.recording.layers) if schedule is None else schedule.needed)
        if schedule is not None and self.skipper is not None:
            counters = self.skipper.count(schedule.phase)
        self._tokens, self._into = ids, cache
        self.call = kind(
            batch, length, self.recording, self._tables, real, self.skipper, schedule, counters, **settings
        )
        self.call.guarded = schedule is not None or guard is not None
        self.call.holes = guard is not None or (schedule is not None and not schedule.whole)

    def abandon(self) -> None:
        """The forward failed: nothing of it is kept, in the cache neither where layers are skipped."""
        if self.call is not None:
            if self.call.guarded:
                ledger.fail(self._into, self._start)
            if self.call.schedule is not None and self.skipper is not None:
                self.skipper.tally(self.call)
        self._clear()

    def _clear(self) -> None:
        self.call = self._tokens = self._into = None

    def _schedule(self, skipper: Skipper, batch: int, cached: bool) -> Schedule:
        """What this call runs of each layer."""
        if self._foreign:
            return skipper.in_force(RESPONSE if self._start else PROMPT, batch)
        if self._new_trace:
            skipper.restart(batch)
        store = None if self._new_trace else self.store
        return skipper.schedule(store, self._phases, batch, self._start, cached, self.generation)

    def commit(self, output: Any) -> None:
        """The body returned: append the call's table to the trace."""
        call, tokens, cache = self.call, self._tokens, self._into
        assert call is not None
        if call.next != self.recording.layers:
            raise RuntimeError(
                f"void_ext: only {call.next} of {self.recording.layers} layers ran in this forward; expected all of "
                "them (was a layer replaced, or config.num_hidden_layers changed, after patching?); call "
                "void_ext.unpatch(model) and patch it again"
            )
        if call.exit is not None and not call.exit.taken:
            raise RuntimeError(
                "void_ext: the final norm that was found when this model was patched did not run in this forward, and "
                "mode='exit' had no effect (was it replaced since?); call void_ext.unpatch(model) and patch it again"
            )
        self._clear()
        start = self._start
        if cache is None:
            cache = cache_of(output)
        if call.holes:
            ledger.close(cache, () if call.schedule is None else call.schedule.skipped, start, call.length)
        if call.schedule is not None and call.counters is not None and self.skipper is not None:
            self.skipper.tally(call)
        if self._foreign:
            return
        tables = call.gather()
        device = tables["norms"].device
        generation = self.generation
        if self._new_trace or self.store is None:
            recording = self.recording
            self.store = TraceStore(
                call.batch,
                recording.layers,
                device,
                updates=recording.updates,
                halves=recording.halves,
                executed=recording.skips,
            )
            self.shared.newest = (self.store, self.skipper)
            self._cache = None
        if generation is not None and not generation.started:
            said = generation.masked if generation.mask is None else generation.mask
            self.store.begin_generation(generation.prompt_length, said)
            generation.first = start
            self.store.ordered = self.store.ordered and not generation.beams
            generation.started = True
        self.store.crop(start)
        self.store.write(
            start,
            call.length,
            self._phases,
            self._calls,
            tables,
            tokens,
            call.real,
        )
        self._calls += 1
        if cache is None or not weakly_referable(cache):
            return
        if self._cache is None or self._cache() is not cache:
            self._cache = weakref.ref(cache)
        self.shared.lengths.note(cache, start + call.length)
        self._rows = address_of(cache) if call.batch > 1 else None

    # ---- traces ----

    @property
    def latest(self) -> tuple[TraceStore | None, Skipper | None]:
        """The trace of this thread, and what skips in it; where it has none, of whichever thread began one last."""
        return self.shared.newest or (None, self.skipper) if self.store is None else (self.store, self.skipper)

    def forget(self) -> None:
        """Drop the current trace and what was counted; the next forward starts a new one."""
        self.store = self.shared.newest = None
        self._cache = None
        self.shared.lengths.clear()

    def release(self) -> None:
        """Forget, and free the tables kept for the next call."""
        self.forget()
        self.abandon()
        self._tables.clear()

    def end_generation(self, finished: bool) -> None:
        """generate() is over; where it returned, its rows end where it stopped."""
        generation, self.generation = self.generation, None
        self.abandon()
        if self.skipper is not None:
            self.skipper.end_generation()
        if generation is None or self.store is None or not generation.started or not finished or not generation.length:
            return
        first = max(generation.first, generation.prompt_length)
        if generation.ended is None and self.store.batch == 1:
            self.store.end_rows(max(first, generation.offset + generation.length - 1))

    def recount(self, cache: Any) -> None:
        """``cache`` comes from the caller, who may have reset it: ask it for its length once more."""
        self.shared.lengths.forget(cache)

    def _place(self, cache: Any, batch: int, length: int) -> None:
        generation = self.generation
        if generation is not None and not generation.started and generation.fresh_cache and not generation.wrapped:
            start = 0
        else:
            start = self.shared.lengths.of(cache)
        going_on = generation is not None and generation.started
        same_cache = cache is not None and self._cache is not None and self._cache() is cache
        fits = self.store is not None and self.store.batch == batch
        self._start = start
        self._new_trace = not (fits and (going_on or (start > 0 and same_cache)))
        if batch > 1 and same_cache and not going_on and not self._new_trace and address_of(cache) != self._rows:
            self._rows_moved()

    def _rows_moved(self) -> None:
        """The caller gave the cache other keys (``reorder_cache``), in an order that nobody told."""
        assert self.store is not None
        if self.skipper is not None and self.skipper.by_row:
            raise ValueError(
                "past_key_values: its rows may have been moved since the last call (reorder_cache), and "
                f"{type(self.skipper.policy).__name__} decides for each row; use granularity='batch' or a plan that is "
                "the same for all rows, or start with a new cache"
            )
        self.store.ordered = False

    def _phases_of(self, start: int, length: int) -> list[int]:
        if self.forced_phase is not None:
            return [self.forced_phase] * length
        if self.generation is not None:
            prompt = self.generation.prompt_length
            return [PROMPT if position < prompt else RESPONSE for position in range(start, start + length)]
        return [RESPONSE if start > 0 and length == 1 else PROMPT] * length

    def force_phase(self, phase: str | None) -> None:
        self.forced_phase = None if phase is None else PHASES.index(phase)


def _real_columns(mask: Any, start: int, length: int) -> Tensor | None:
    """What an attention mask says of these positions: ``[B, length]`` bool, True = real; None = all of them."""
    if isinstance(mask, dict):  # one mask per kind of attention layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        end = start + length
        return (mask[:, start:end] if mask.shape[1] >= end else mask[:, -length:]) != 0
    if mask.dim() == 4 and mask.shape[-1] >= start + length:
        # A prepared mask, bool or additive: a real token attends at least to itself.
        own = mask[:, 0].diagonal(offset=start, dim1=-2, dim2=-1)[:, :length]
        return own if own.dtype == torch.bool else own == 0
    return None
