"""The forward of a layer under a plan: halves that nobody runs are not launched, and K and V alone where that is all
later tokens need.

A half that only some rows run goes over all of them and the old stream is kept where it is off, or over the rows that
are on (`void_ext.dispatch`); both are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from void_ext.dispatch import run_rows
from void_ext.patching.call import Call
from void_ext.patching.fused import FusedForward, add_and_norm
from void_ext.patching.ledger import cache_in
from void_ext.patching.norms import NormAfterAdd, same_kind
from void_ext.patching.projection import key_form, project
from void_ext.patching.recorder import Recorders
from void_ext.patching.registry import LayerForm
from void_ext.patching.schedule import ALL, NONE, PROJECT, SOME, Schedule

_add_into: Callable[..., None] = torch.ops.void_ext.add_l2norm.into
_keep_rows: Callable[..., Tensor] = torch.ops.void_ext.keep_rows.default


class SkipForward(FusedForward):
    """An instance ``forward`` for one decoder layer that does what the call's schedule says."""

    def __init__(self, layer: nn.Module, index: int, form: LayerForm, recorders: Recorders, **norms: nn.Module | None):
        super().__init__(layer, index, form, recorders, **norms)
        self.keys, _ = key_form(getattr(layer, form.attention))
        self.nothing = (index, NONE, NONE, 0)

    def _under_plan(
        self, call: Call, schedule: Schedule, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        index, entered = self.index, stream
        attention, mlp = schedule.attention[index], schedule.mlp[index]
        following = self.following
        watched = bool(self.layer._forward_hooks or (following is not None and following._forward_pre_hooks))
        streams = call.streams
        if attention == mlp == NONE and streams is not None and index == call.next and not watched:
            # What follows, with nothing to do at all.
            streams.append(stream)
            call.launched.append(self.nothing)
            call.last, call.next = stream, index + 1
            return stream
        call.enter(index, entered)
        kwargs = self.complete(args, kwargs)
        if attention == PROJECT and cache_in(kwargs) is None:
            attention = NONE  # nobody to keep K and V for
        if attention == NONE and mlp == NONE:
            call.launched.append(self.nothing)
            # Whoever writes to it in place must not write to the stream that entered.
            stream = entered.clone() if watched else entered
            call.skip(index, stream, doubtful=watched)
            return stream
        stream = self._partly(call, schedule, attention, entered, kwargs)
        if stream is entered:  # K and V alone, or a mask with no row on
            call.skip(index, stream, doubtful=watched)
        else:
            call.leave(index, stream, entered, doubtful=watched)
            if call.halted is not None:
                on = call.rows_on(index, stream.device)
                assert on is not None
                call.judge(on[0])
        return stream

    def _partly(self, call: Call, schedule: Schedule, attention: int, stream: Tensor, kwargs: dict[str, Any]) -> Tensor:
        index, form = self.index, self.form
        modules: dict[str, Any] = self.layer._modules
        mlp = schedule.mlp[index]
        on = call.rows_on(index, stream.device)
        closing = (call.norms, index + 1)
        middle_place = closing if mlp == NONE else (None if call.halves is None else (call.halves, index))

        normed, call.normed = call.normed, None
        middle = stream
        if attention != NONE:
            if attention == PROJECT:
                if normed is None:
                    normed = stream if form.input_norm is None else modules[form.input_norm](stream)
                assert self.keys is not None
                project(self.keys, modules[form.attention], normed, kwargs)
            else:
                update = self.attend(stream, normed, kwargs)
                middle = _close(call, stream, update, None if on is None else on[0], middle_place)
        if call.halves is not None and (middle is stream or mlp == NONE):
            call.tap(call.halves, index, middle)
        computed = 0
        if mlp == ALL:
            update = self.feed(middle)
            computed = call.batch * call.length
            result = _close(call, middle, update, None if on is None else on[1], closing)
        elif mlp == SOME:
            assert on is not None
            result, computed = run_rows(
                middle,
                on[1],
                self.feed,
                count=schedule.counts(index, call.batch, call.length)[1],
                costs=call.costs,
            )
            if result is not middle and call.streams is None:
                call.tap(call.norms, index + 1, result)
        else:
            result = middle
        call.launched.append((index, attention, mlp, computed))
        return result

    def _next_norm(self, call: Call) -> NormAfterAdd | None:
        schedule = call.schedule
        if schedule is not None and self.following is not None and schedule.attention[self.index + 1] == NONE:
            return None
        return super()._next_norm(call)


def _close(call: Call, residual: Tensor, update: Tensor, on: Tensor | None, place: tuple[Tensor, int] | None) -> Tensor:
    """``residual + update`` in the rows that are on (None: all), and its norm in ``place`` where one is wanted."""
    if on is None:
        return residual + update if place is None else add_and_norm(call, residual, update, *place)
    if place is not None and call.streams is not None and place[0] is call.norms:
        place = None  # taken at the end of the call
    if call.plain or not same_kind(residual, update):
        mask = on.view(*residual.shape[:-1], 1)
        stream = torch.where(mask, residual + update, residual)
        if place is not None:
            call.tap(*place, stream)
    elif place is None:
        stream = _keep_rows(residual, update, on)
    else:
        stream = torch.empty_like(residual, memory_format=torch.contiguous_format)
        _add_into(residual, update, *place, None, on, 0.0, None, None, None, stream)
    return stream
