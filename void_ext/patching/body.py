"""Hooks around the stack as a whole: where a call begins and ends, and what the final norm gets to see."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch._subclasses.fake_tensor import FakeTensor

from void_ext.patching.captured import commit_captured
from void_ext.patching.compiled import CompiledCall, refuse_inside
from void_ext.patching.recorder import Recorders
from void_ext.patching.registry import unwrapped
from void_ext.patching.structure import refuse_sharded


class BeginCall:
    """Pre-hook on the body. Inactive while training: nothing is recorded and layers run their own forward."""

    def __init__(self, recorders: Recorders, body: nn.Module, fused: nn.Module | None = None):
        self.recorders = recorders
        self.fused = fused  # a layer whose forward is replaced by ours
        self.forward = None if fused is None else type(fused).forward
        self.names = tuple(inspect.signature(type(body).forward).parameters)[1:]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder = self.recorders.own
        call = recorder.call
        if isinstance(call, CompiledCall):
            return  # opened, and to be closed, by the CompiledEntry
        active = not module.training and not recorder.paused
        if active:
            refuse_inside(module)
        if call is not None:
            recorder.abandon()
        if active:
            arguments = {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs
            for value in arguments.values():
                if isinstance(value, FakeTensor):
                    raise RuntimeError(
                        "void_ext: a patched model was called with fake tensors (torch.export, make_fx, "
                        "FakeTensorMode), of which nothing can be recorded; call void_ext.unpatch(model) first, or use "
                        "torch.compile"
                    )
            self.open(module, arguments)

    def open(self, module: nn.Module, arguments: dict[str, Any], *how: Any) -> None:
        """Begin a call of the body with these arguments, recorded in the way that ``how`` says (Recorder.begin)."""
        if self.fused is not None and self.forward is not (now := type(self.fused).forward) and self._is_other(now):
            raise RuntimeError(
                f"void_ext: {type(self.fused).__name__}.forward was replaced on its class since this model was patched "
                "(Liger does that), and would not be called; call void_ext.unpatch(model) and patch it again"
            )
        recorder = self.recorders.own
        attentions = arguments.get("output_attentions")
        if recorder.skipper is not None:
            if attentions is None:
                attentions = getattr(module.config, "output_attentions", False)
            given = arguments.get("input_ids")
            if recorder.store is None or given is None or given.shape[1] > 1:  # once a prompt
                refuse_sharded(module)
        recorder.begin(arguments, bool(attentions), *how)

    def _is_other(self, forward: Any) -> bool:
        # One more of transformers' decorators may have come around it: fully_shard's subclass gets a checkpointing one.
        try:
            return unwrapped(forward) is not unwrapped(self.forward)
        except TypeError:
            return True


skip_code(BeginCall.__call__.__code__)  # what it refuses must not be compiled away


class EndCall:
    """Hook on the body, called also when the forward raised (then with no output)."""

    def __init__(self, recorders: Recorders):
        self.recorders = recorders

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recorder = self.recorders.own
        call = recorder.call
        if call is None:
            return
        if isinstance(call, CompiledCall):
            call.close()
        elif output is None:
            recorder.abandon()
        elif call.captured:
            commit_captured(recorder, module, output)
        else:
            recorder.commit(output)


class BeforeFinalNorm:
    """Pre-hook on the final norm: the last layer's stream is settled; in mode ``exit`` the norm gets another one."""

    def __init__(self, recorders: Recorders):
        self.recorders = recorders

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = self.recorders.own.call
        if call is None or not args or call.next != call.recording.layers:
            return None
        call.settle(args[0])
        if call.exit is None:
            return None
        call.exit.taken = True
        return (call.exit.kept, *args[1:])
