"""What happens around a forward of a patched model: where its rows belong, and their way into the trace.

The body's hooks open and close a `Call`; closing appends its table to the trace. Positions, phases and cache lengths
are counted here, on the host: nothing asks the device.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from void_ext.patching.call import Call
from void_ext.patching.recording import Recording
from void_ext.store import PHASES, PROMPT, RESPONSE, TraceStore


@dataclass
class Generation:
    """What a running ``generate()`` tells about its forwards."""

    prompt_length: int
    fresh_cache: bool  # the caller handed no cache over
    eos: tuple[int, ...]
    beams: bool
    mask: Tensor | None = None  # [B, positions so far], as generate() extends it
    started: bool = False


@dataclass
class Recorder:
    """Keeps the current call, the current trace and how long each cache is."""

    recording: Recording
    call: Call | None = None
    store: TraceStore | None = None
    generation: Generation | None = None
    forced_phase: int | None = None
    paused: bool = False
    _calls: int = 0
    _tables: dict[torch.device, list[Tensor | None]] = field(default_factory=dict)  # of the last call, for the next
    _start: int = 0
    _arguments: dict[str, Any] = field(default_factory=dict)
    _new_trace: bool = False
    _cache: Any = None
    _lengths: weakref.WeakKeyDictionary[Any, int] = field(default_factory=weakref.WeakKeyDictionary)

    def __getstate__(self) -> dict[str, Any]:
        # Copying or saving a patched model copies the patch, not what it has recorded.
        return {"recording": self.recording}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Recorder.__init__(self, state["recording"])

    # ---- around a forward ----

    def begin(self, arguments: dict[str, Any]) -> None:
        """The body is about to run with these (keyword) arguments."""
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        given = ids if ids is not None else embeds
        if given is None:
            raise RuntimeError("void_ext: the model was called with neither input_ids nor inputs_embeds")
        batch, length = given.shape[:2]
        # gpt_neox calls its cache layer_past inside, but every body takes it as past_key_values.
        cache = arguments.get("past_key_values")
        self._arguments = {"tokens": ids, "cache": cache}
        self._place(cache, batch, length)
        generation = self.generation
        mask = generation.mask if generation is not None and generation.mask is not None else None
        if mask is None:
            mask = arguments.get("attention_mask")
        real = _real_columns(mask, self._start, length)
        self.call = Call(batch, length, self.recording, self._tables, real)

    def abandon(self) -> None:
        """The forward failed: nothing of it is kept."""
        self.call = None
        self._arguments = {}

    def commit(self, output: Any) -> None:
        """The body returned: append the call's table to the trace."""
        call, arguments = self.call, self._arguments
        assert call is not None
        self.abandon()
        if call.next != self.recording.layers:
            raise RuntimeError(
                f"void_ext: only {call.next} of {self.recording.layers} layers ran in this forward; expected all of "
                "them (was config.num_hidden_layers changed after patching?)"
            )
        start = self._start
        tables = call.gather()
        device = tables["norms"].device
        generation = self.generation
        if self._new_trace or self.store is None:
            recording = self.recording
            self.store = TraceStore(
                call.batch, recording.layers, device, updates=recording.updates, halves=recording.halves
            )
            self._cache = None
        if generation is not None and not generation.started:
            self.store.begin_generation(generation.prompt_length, generation.eos)
            self.store.ordered = self.store.ordered and not generation.beams
            generation.started = True
        self.store.crop(start)
        self.store.write(
            start,
            call.length,
            self._phases(start, call.length),
            self._calls,
            tables,
            arguments["tokens"],
            call.real,
        )
        self._calls += 1
        cache = arguments["cache"] if arguments["cache"] is not None else _cache_of(output)
        if cache is not None and _weakly_referable(cache):
            self._lengths[cache] = start + call.length
            self._cache = weakref.ref(cache)

    # ---- traces ----

    def forget(self) -> None:
        """Drop the current trace and what was counted; the next forward starts a new one."""
        self.store = None
        self._cache = None
        self._lengths.clear()

    def release(self) -> None:
        """Forget, and free the tables kept for the next call."""
        self.forget()
        self.abandon()
        self._tables.clear()

    def recount(self, cache: Any) -> None:
        """``cache`` comes from the caller, who may have reset it: ask it for its length once more."""
        if cache is not None and _weakly_referable(cache):
            self._lengths.pop(cache, None)

    def _place(self, cache: Any, batch: int, length: int) -> None:
        generation = self.generation
        if generation is not None and not generation.started and generation.fresh_cache:
            start = 0
        else:
            start = self._length_of(cache)
        going_on = generation is not None and generation.started
        same_cache = cache is not None and self._cache is not None and self._cache() is cache
        fits = self.store is not None and self.store.batch == batch
        self._start = start
        self._new_trace = not (fits and (going_on or (start > 0 and same_cache)))

    def _length_of(self, cache: Any) -> int:
        """Positions a cache holds. Shapes tell it where they can (and show that it was cropped); else our count."""
        if cache is None:
            return 0
        if isinstance(cache, (tuple, list)):
            return int(cache[0][0].shape[-2]) if cache and cache[0] is not None else 0
        if getattr(cache, "is_compileable", False) and cache in self._lengths:
            return self._lengths[cache]  # a static cache answers with a device tensor
        # Asked once of a static cache: when it comes with content we have not counted.
        return int(cache.get_seq_length())

    def _phases(self, start: int, length: int) -> list[int]:
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


def _cache_of(output: Any) -> Any:
    if isinstance(output, dict) or hasattr(output, "past_key_values"):
        return getattr(output, "past_key_values", None)
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return None


def _weakly_referable(value: Any) -> bool:
    return not isinstance(value, (tuple, list)) and hasattr(type(value), "__weakref__")
