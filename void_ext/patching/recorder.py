"""What happens around and during one forward of a patched model.

The body's hooks open and close a `Call`; layers write norms into the call's table as they run; closing appends the
table to the trace. Positions, phases and cache lengths are counted here, on the host: nothing asks the device.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from void_ext.patching.exit import ExitSelector
from void_ext.store import PHASES, PROMPT, RESPONSE, TraceStore

_row_l2norm = torch.ops.void_ext.row_l2norm.default
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Generation:
    """What a running ``generate()`` tells about its forwards."""

    prompt_length: int
    fresh_cache: bool  # the caller handed no cache over
    eos: tuple[int, ...]
    beams: bool
    mask: Tensor | None = None  # [B, positions so far], as generate() extends it
    started: bool = False


@dataclass(frozen=True)
class Recording:
    """The fixed facts of a patch that decide what a call records."""

    layers: int
    mode: str
    alpha: float
    granularity: str
    quirks: bool
    updates: bool
    halves: bool
    native_devices: tuple[str, ...]  # device types this build has kernels for


class Call:
    """One forward of the layer stack: a table of ``batch * length`` rows, filled column by column.

    ``norms`` has a spare last column, which takes the norms that nobody asked for (of a fused RMSNorm, say).
    """

    def __init__(
        self,
        batch: int,
        length: int,
        recording: Recording,
        tables: dict[torch.device, list[Tensor | None]],
        real: Tensor | None = None,
    ):
        self.batch = batch
        self.length = length
        self.recording = recording
        self.real = real  # [batch, length] bool, None: all
        self.next = 0
        self.native = False
        self.plain = False
        self.norms: Tensor = torch.empty(0)
        self.updates: Tensor | None = None
        self.halves: Tensor | None = None
        self.exit: ExitSelector | None = None
        self.normed: Tensor | None = None  # the next layer's normed input, where the closing add has made it
        self._last: Tensor | None = None
        self._version: int | None = None
        self._doubtful = False
        self._tables = tables
        self._devices: list[tuple[int, torch.device]] = []  # (layer, the device from it on)

    def enter(self, index: int, stream: Tensor) -> None:
        """Layer ``index`` is about to run on ``stream``."""
        if index != self.next:
            self._out_of_step(index)
        if index == 0:
            self._open(stream)
        elif stream.device != self.norms.device:
            self._move(stream)
        else:
            self.settle(stream)

    def leave(self, index: int, stream: Tensor, entered: Tensor | None = None, *, doubtful: bool = False) -> None:
        """Layer ``index`` gave ``stream``, whose norm is in column ``index + 1``.

        ``entered`` is what the layer was given. ``doubtful`` says that a hook may change the stream unseen.
        """
        self.next = index + 1
        self._last, self._version, self._doubtful = stream, _version(stream), doubtful
        if self.updates is not None and entered is not None:
            self.tap(self.updates, index, stream.detach().float() - entered.detach().float())

    def settle(self, stream: Tensor) -> None:
        """``stream`` is what the layer before left, as the next one sees it: hooks may have changed it on the way."""
        if stream is not self._last or self._doubtful or self._version != _version(stream):
            self.normed = None
            self.tap(self.norms, self.next, stream)
        self._last = None
        if self.exit is not None:
            self.exit.step(self.next - 1, stream, self.norms)

    def tap(self, table: Tensor, column: int, stream: Tensor) -> None:
        """Write the L2 norm of each row of ``stream`` into a column of ``table``."""
        stream = stream.detach()
        if self.native:
            _row_l2norm(stream, table, column)
        else:
            norms = torch.linalg.vector_norm(stream, dim=-1, dtype=torch.float32)
            table[: self.batch * self.length, column].copy_(norms.view(-1))

    def gather(self) -> dict[str, Tensor]:
        """The finished tables as ``[batch, length, columns]``, all on the device of the first layer."""
        names = ("norms", "updates", "halves")
        first = self._devices[0][1]
        tables = dict(zip(names, self._tables[first], strict=True))
        ends = [start for start, _ in self._devices[1:]] + [self.recording.layers]
        for (start, device), end in zip(self._devices, ends, strict=True):
            if device != first:
                for name, shift, source in zip(names, (1, 0, 0), self._tables[device], strict=True):
                    target = tables[name]
                    if target is not None and source is not None:
                        columns = slice(start + shift, end + shift)
                        target[:, columns].copy_(source[:, columns])
        layers = self.recording.layers
        width = {"norms": layers + 1, "updates": layers, "halves": layers}
        return {
            name: table[:, : width[name]].view(self.batch, self.length, -1)
            for name, table in tables.items()
            if table is not None
        }

    def _open(self, stream: Tensor) -> None:
        if stream.dim() != 3 or stream.shape[:2] != (self.batch, self.length):
            raise RuntimeError(
                f"void_ext: the residual stream entering layer 0 has shape {tuple(stream.shape)}; expected one vector "
                f"per input token, ({self.batch}, {self.length}, width). This model cannot be traced: "
                "void_ext.unpatch(model) leaves it as it was"
            )
        self._use(stream)
        self.tap(self.norms, 0, stream)
        if self.recording.mode == "exit":
            self.exit = ExitSelector(stream, self.norms, self.batch, self.recording, self.real)

    def _use(self, stream: Tensor) -> None:
        device = stream.device
        recording = self.recording
        self._devices.append((self.next, device))
        rows = self.batch * self.length
        held = self._tables.get(device)
        if held is None or held[0] is None or held[0].shape[0] != rows:
            widths = (
                recording.layers + 2,
                recording.layers if recording.updates else 0,
                recording.layers if recording.halves else 0,
            )
            # A table made under inference_mode could not be read back in a later call outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._tables[device] = [
                    torch.empty(rows, width, dtype=torch.float32, device=device) if width else None for width in widths
                ]
        norms, self.updates, self.halves = self._tables[device]
        assert norms is not None
        self.norms = norms
        self.native = device.type in recording.native_devices and stream.dtype in _NATIVE_DTYPES
        # Under grad mode the add must be differentiable: plain add, detached norms.
        self.plain = torch.is_grad_enabled() or not self.native

    def _move(self, stream: Tensor) -> None:
        if self.exit is not None:
            raise RuntimeError(
                f"void_ext: mode='exit' needs all layers on one device; layer {self.next} runs on {stream.device} and "
                f"the layers before it on {self.norms.device}. Use mode='trace', or load the model on one device"
            )
        self._use(stream)

    def _out_of_step(self, index: int) -> None:
        what = "runs a second time" if index < self.next else f"runs right after layer {self.next - 1}"
        raise RuntimeError(
            f"void_ext: layer {index} {what} in one forward; expected each of the {self.recording.layers} layers "
            "once, in order. This model cannot be traced: void_ext.unpatch(model) leaves it as it was"
        )


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


def _version(stream: Tensor) -> int | None:
    return None if stream.is_inference() else stream._version


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
