"""Hooks around the stack as a whole: where a call begins and ends, and what the final norm gets to see."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import skip_code

from void_ext.patching.compiled import CompiledCall, refuse_inside
from void_ext.patching.recorder import Recorder


class BeginCall:
    """Pre-hook on the body. Inactive while training: nothing is recorded and layers run their own forward."""

    def __init__(self, recorder: Recorder, body: nn.Module):
        self.recorder = recorder
        self.names = tuple(inspect.signature(type(body).forward).parameters)[1:]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.recorder.call
        if isinstance(call, CompiledCall):
            return  # opened, and to be closed, by the CompiledEntry
        active = not module.training and not self.recorder.paused
        if active:
            refuse_inside(module)
        self.recorder.abandon()
        if active:
            self.recorder.begin({**dict(zip(self.names, args, strict=False)), **kwargs})


skip_code(BeginCall.__call__.__code__)  # what it refuses must not be compiled away


class EndCall:
    """Hook on the body, called also when the forward raised (then with no output)."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self.recorder.call
        if call is None:
            return
        if isinstance(call, CompiledCall):
            call.drop()
        elif output is None:
            self.recorder.abandon()
        else:
            self.recorder.commit(output)


class BeforeFinalNorm:
    """Pre-hook on the final norm: the last layer's stream is settled; in mode ``exit`` the norm gets another one."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = self.recorder.call
        if call is None or not args or call.next != self.recorder.recording.layers:
            return None
        call.settle(args[0])
        return None if call.exit is None else (call.exit.kept, *args[1:])
