"""The generic adapter: hooks around layers whose inside we do not know. One more pass over each layer's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from void_ext.patching.recorder import Recorders


class EnterLayer:
    """Pre-hook: notes the stream that enters a layer."""

    def __init__(self, recorders: Recorders, index: int):
        self.recorders = recorders
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.recorders.own.call
        if call is None:
            return
        stream = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(stream, Tensor):
            raise RuntimeError(
                f"void_ext: layer {self.index} ({type(module).__name__}) was called without hidden_states as its first "
                "argument; this model cannot be traced: void_ext.unpatch(model) leaves it as it was"
            )
        call.enter(self.index, stream)
        # Some layers add in place: what is compared later must be a copy.
        call.entered = stream.detach().clone() if call.updates is not None else None


class LeaveLayer:
    """Hook: takes the norm of what a layer returns, tensor or tuple."""

    def __init__(self, recorders: Recorders, index: int):
        self.recorders = recorders
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self.recorders.own.call
        if call is None:
            return
        stream = output[0] if isinstance(output, (tuple, list)) else output
        call.tap(call.norms, self.index + 1, stream)
        call.leave(self.index, stream, call.entered, doubtful=len(module._forward_hooks) > 1)
        call.entered = None
