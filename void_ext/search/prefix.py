"""Plans measured without running again what they share: the stream before every half of the layers is kept, and another
plan runs from the first half where it differs.

The model's own forward does all of it, masks, positions, final norm and head included: only its layers have an instance
``forward`` meanwhile, which hands on a kept stream where the calls before ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from void_ext.patching import patch
from void_ext.patching.halves import Halves
from void_ext.patching.registry import LayerForm, common_form
from void_ext.patching.structure import DecoderStack, find_decoder_stack
from void_ext.patching.undo import InstanceAttribute, Undo, remove_all
from void_ext.plan import VoidPlan


def check_searchable(model: nn.Module) -> DecoderStack:
    """The layers of a model that plans can be measured on and applied to.

    Raises what ``void_ext.patch(model, mode="skip")`` raises, and ValueError in training mode.
    """
    stack = find_decoder_stack(model)
    if model.training:
        raise ValueError("model: expected eval mode, got training mode; call model.eval() first")
    patch(model, mode="skip", plan=VoidPlan.dense(len(stack.layers))).unpatch()
    return stack


@dataclass
class _Turn:
    """One pass: from half ``start`` on, ``stream`` having entered it, without the halves ``off``."""

    start: int
    stream: Tensor
    off: frozenset[int]
    kept: list[Tensor] | None = None  # the stream before each half from ``start`` on
    launched: int = 0


@dataclass
class _State:
    turn: _Turn | None = None


class PrefixRunner:
    """Runs the layers of one model from any half on. Halves are counted 2l (attention of layer l) and 2l + 1 (its MLP).

    A context manager: the model is as it was afterwards, also after an error. While it is open the model must not be
    used otherwise.

    Args:
        model: a transformers model in eval mode that ``patch(mode="skip")`` takes, unpatched.

    Attributes:
        layers: how many it has.
        launched: halves of layers that were run so far, over one sequence each.

    Raises what :func:`check_searchable` raises.
    """

    def __init__(self, model: nn.Module):
        self.stack = check_searchable(model)
        self.layers = len(self.stack.layers)
        form, why = common_form(self.stack.layers)
        assert form is not None, why
        self.launched = 0
        self._state = _State()
        self._changes: list[Undo] = [
            InstanceAttribute(layer, "forward", _Replay(layer, index, form, self._state, index == self.layers - 1))
            for index, layer in enumerate(self.stack.layers)
        ]

    def __enter__(self) -> PrefixRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was found."""
        remove_all(self._changes)

    @torch.inference_mode()
    def dense(self, ids: Tensor) -> list[Tensor]:
        """The streams ``[1, T, D]`` before every half of the whole model, and the one after the last: 2L + 1 of them.

        ``ids``: ``[1, T]``, no padding.
        """
        embedded: list[Tensor] = []
        turn = _Turn(0, torch.empty(0, device=ids.device), frozenset(), embedded)
        self._pass(ids, turn)
        return embedded

    @torch.inference_mode()
    def run(
        self, ids: Tensor, start: int, stream: Tensor, off: frozenset[int], kept: list[Tensor] | None = None
    ) -> Tensor:
        """The stream after the last layer, from the one that enters half ``start``; ``kept`` gets those in between."""
        halves = 2 * self.layers
        if all(half in off for half in range(start, halves)):
            if kept is not None:
                kept.extend([stream] * (halves - start + 1))
            return stream
        turn = _Turn(start, stream, off, kept)
        self._pass(ids, turn)
        return turn.stream

    @torch.inference_mode()
    def logits(self, ids: Tensor, stream: Tensor) -> Tensor:
        """What final norm and head make of streams after the last layer: ``[1, T, D]`` -> ``[T, V]``.

        ``ids`` only lends its shape: what follows the layers looks at each position alone, so any positions may be
        taken together.
        """
        self._state.turn = _Turn(2 * self.layers, stream, frozenset())
        try:
            output: Tensor = self.stack.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._state.turn = None
        return output

    def _pass(self, ids: Tensor, turn: _Turn) -> None:
        self._state.turn = turn
        body: Any = self.stack.body
        try:
            body(input_ids=ids, use_cache=False)
        finally:
            self._state.turn = None
        self.launched += turn.launched


class _Replay(Halves):
    """An instance ``forward`` of one layer that does its part of the runner's turn, and else what the layer does."""

    def __init__(self, layer: nn.Module, index: int, form: LayerForm, state: _State, last: bool):
        super().__init__(layer, form)
        self.index = index
        self.state = state
        self.last = last

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        turn = self.state.turn
        if turn is None:
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        first = 2 * self.index
        if turn.start == 0 and first == 0 and not turn.stream.numel():
            turn.stream = hidden_states
        if turn.start > first + 1:
            # The body is shown the streams it was made for: what it does behind the last one is all that counts.
            return turn.stream if self.last else hidden_states
        kwargs = self.complete(args, kwargs)
        for half in range(max(first, turn.start), first + 2):
            if turn.kept is not None:
                turn.kept.append(turn.stream)
            if half not in turn.off:
                update = self.attend(turn.stream, None, kwargs) if half == first else self.feed(turn.stream)
                turn.stream = turn.stream + update
                turn.launched += 1
        if self.last and turn.kept is not None:
            turn.kept.append(turn.stream)
        return turn.stream


@dataclass
class Prefixes:
    """The kept streams of one text under one plan, which others are run from.

    Attributes:
        ids: ``[S, T]``: sequences without padding.
        off: the halves that the plan goes without.
        parts: 2 keeps the stream before every half, 1 before every layer alone (half the memory).
    """

    runner: PrefixRunner
    ids: Tensor
    parts: int = 1
    off: frozenset[int] = field(default_factory=frozenset)
    _streams: list[list[Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for row in self.ids:
            self._streams.append(self._thinned(self.runner.dense(row[None]), 0))

    def finals(self) -> list[Tensor]:
        """The stream after the last layer, ``[1, T, D]`` per sequence."""
        return [streams[-1] for streams in self._streams]

    def run(self, off: frozenset[int], sequences: Iterable[int] | None = None) -> list[Tensor]:
        """The same under another plan, for the sequences named (None: all)."""
        start = self._start(off)
        chosen = range(len(self.ids)) if sequences is None else sequences
        return [
            self.runner.run(self.ids[index : index + 1], start, self._streams[index][start * self.parts // 2], off)
            for index in chosen
        ]

    def adopt(self, off: frozenset[int]) -> None:
        """Keep the streams of ``off`` from now on."""
        start = self._start(off)
        place = start * self.parts // 2
        for index, streams in enumerate(self._streams):
            kept: list[Tensor] = []
            self.runner.run(self.ids[index : index + 1], start, streams[place], off, kept)
            streams[place:] = self._thinned(kept, start)
        self.off = off

    def _start(self, off: frozenset[int]) -> int:
        """The first half whose input is kept and before which both plans do the same."""
        first = min(self.off ^ off, default=2 * self.runner.layers)
        # A half that goes needs no run: what leaves it is what entered.
        return first - first % (2 // self.parts)

    def _thinned(self, streams: Sequence[Tensor], start: int) -> list[Tensor]:
        step = 2 // self.parts
        return [stream for half, stream in enumerate(streams, start) if half % step == 0]


def launches(off: frozenset[int], start: int, layers: int) -> int:
    """Halves that a run from ``start`` on launches for one sequence."""
    return sum(half not in off for half in range(start, 2 * layers))
