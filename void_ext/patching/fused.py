"""The fused forward of layers that add to a stream: the add that closes a layer also yields the norm of its result.

``fuse="add"`` replaces that add alone and keeps every bit of the layer's output. ``fuse="norm"`` also takes RMSNorms of
the stream into the adds before them, across the layer boundary too (at most 1 ulp on few elements).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from void_ext.patching.call import Call
from void_ext.patching.halves import Halves
from void_ext.patching.norms import NormAfterAdd, same_kind
from void_ext.patching.recorder import Recorders
from void_ext.patching.registry import LayerForm
from void_ext.patching.schedule import ALL, Schedule

_add_l2norm: Callable[..., Tensor] = torch.ops.void_ext.add_l2norm.default


class FusedForward(Halves):
    """An instance ``forward`` for one decoder layer; outside of a traced forward it runs the layer's own."""

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        form: LayerForm,
        recorders: Recorders,
        post_norm: nn.Module | None = None,
        next_norm: nn.Module | None = None,
        following: nn.Module | None = None,
    ):
        super().__init__(layer, form)
        self.index = index
        self.recorders = recorders
        # Norms to be fused, as far as their formula is known: the one inside, and the one that follows the layer.
        self.post_norm = NormAfterAdd.of(post_norm)
        self.next_norm = NormAfterAdd.of(next_norm)
        self.following = following
        self.quick = form.pre_norm and form.passes_rest
        self.whole = (index, ALL, ALL, -1)

    @property
    def __wrapped__(self) -> Any:
        # inspect.signature(layer.forward) goes on showing the layer's own.
        return type(self.layer).forward.__get__(self.layer)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = self.recorders.own.call
        if call is None:  # not __wrapped__: dynamo of torch 2.11 does not trace a function's __get__
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        index, form = self.index, self.form
        schedule = call.partial
        if schedule is None:
            call.begun = index + 1
        elif schedule.attention[index] != ALL or schedule.mlp[index] != ALL or call.halting:
            return self._under_plan(call, schedule, hidden_states, args, kwargs)
        else:
            call.launched.append(self.whole)
        modules: dict[str, Any] = self.layer._modules  # looked up at each call: others may replace parts
        if index == 0:
            call.enter(0, hidden_states)
        streams = call.streams
        usual = self.quick and not args and index == call.next
        if streams is not None and usual and hidden_states.get_device() == call.ordinal:
            # What follows, with nothing to do but keep the stream: a decode step feels every line of Python.
            if index:
                streams.append(hidden_states)
            if not self.needed.issubset(kwargs):
                kwargs = self.complete(args, kwargs)
            normed = modules[form.input_norm](hidden_states)  # type: ignore[index]
            update = modules[form.attention](hidden_states=normed, **kwargs)[0]
            middle = hidden_states + update
            update = modules[form.mlp](modules[form.post_norm](middle))  # type: ignore[index]
            call.last = middle + (update[0] if isinstance(update, tuple) else update)
            call.next = index + 1
            return call.last
        kwargs = self.complete(args, kwargs)
        if index:
            call.enter(index, hidden_states)

        normed, call.normed = call.normed, None
        update = self.attend(hidden_states, normed, kwargs)

        post, normed = self._post_norm(), None
        if post is not None and post.fits(call, hidden_states, update):
            middle, normed = post.add(hidden_states, update, call.halves, index)
        elif call.halves is not None:
            middle = add_and_norm(call, hidden_states, update, call.halves, index)
        else:
            middle = hidden_states + update

        update = self.feed(middle, normed)
        # Hooks may change the stream between two layers: norms must be of what they made of it.
        following = self.following
        watched = bool(self.layer._forward_hooks or (following is not None and following._forward_pre_hooks))
        known = None if watched else self._next_norm(call)
        if known is not None and known.fits(call, middle, update):
            stream, call.normed = known.add(middle, update, call.norms, index + 1)
        else:
            stream = add_and_norm(call, middle, update, call.norms, index + 1)
        call.leave(index, stream, hidden_states, doubtful=watched)
        return stream

    def _under_plan(
        self, call: Call, schedule: Schedule, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The layer where some rows, or all, go without one of its halves."""
        raise NotImplementedError

    # Somebody may have put another norm in its place since, or hooked it.

    def _post_norm(self) -> NormAfterAdd | None:
        known, name = self.post_norm, self.form.post_norm
        if known is None or name is None or self.layer._modules[name] is not known.norm or known.hooked:
            return None
        return known

    def _next_norm(self, call: Call) -> NormAfterAdd | None:
        known, following, name = self.next_norm, self.following, self.form.input_norm
        if known is None or following is None:
            # The final norm's module is called in any case, and hooks behind it see what it gives.
            return None if known is None or known.taken_over else known
        return None if name is None or following._modules[name] is not known.norm or known.hooked else known


def add_and_norm(call: Call, residual: Tensor, update: Tensor, table: Tensor, column: int) -> Tensor:
    """The sum, and its norm in a column of ``table`` where that is not left for the end of the call."""
    if call.streams is not None:
        return residual + update
    if call.plain or not same_kind(residual, update):
        stream = residual + update
        call.tap(table, column, stream)
        return stream
    return _add_l2norm(residual, update, table, column)
