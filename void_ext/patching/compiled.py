"""Under ``torch.compile``: what a call records is opened and closed outside of the compiled code.

The model's own ``forward`` is entered through a `CompiledEntry`, which dynamo does not compile. It places the call,
asks the policy and the cache's ledger, runs the forward, which dynamo does compile, and appends the finished table to
the trace. Inside of the graph there is tensor work alone: no position, no length and no cache is a constant of it, so
no token makes it anew.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_eval_frame
from torch._dynamo.eval_frame import skip_code

from void_ext.patching.call import Call
from void_ext.patching.captured import commit_captured
from void_ext.patching.exit import ExitSelector
from void_ext.patching.recorder import Recorders

_numbers = itertools.count()

_HOW = (
    "void_ext: a patched model was called inside of a function that torch.compile captures whole, where its trace "
    "cannot be kept. Compile the patched model itself, torch.compile(model, fullgraph=True) or model.compile(), or "
    "leave fullgraph out, or call void_ext.unpatch(model)"
)


class CompiledCall(Call):
    """A `Call` that a compiled forward fills: one table that is there before, and no state but tensors' names."""

    compiled = True

    def __init__(self, *arguments: Any, device: torch.device, dtype: torch.dtype):
        super().__init__(*arguments)
        self._use(device, dtype)
        self.writer = None  # no part of a graph
        for table in (self.norms, self.updates, self.halves):
            if table is not None:  # CUDA graphs write to it where it is
                torch._dynamo.mark_static_address(table)

    def enter(self, index: int, stream: Tensor) -> None:
        if index != self.next:
            self._out_of_step(index)
        if stream.device != self.norms.device:
            raise RuntimeError(
                f"void_ext: layer {index} runs on {stream.device} and the call began on {self.norms.device}; a "
                "compiled model that is patched has to be on one device"
            )
        if index:
            self.settle(stream)
            return
        self._check_stream(stream)
        self._judge_kernels(stream.device, stream.dtype)
        self._take_first(stream)
        if self.recording.mode == "exit":
            self.exit = ExitSelector(stream, self.norms, self.batch, self.recording, self.real)

    def leave(self, index: int, stream: Tensor, entered: Tensor | None = None, *, doubtful: bool = False) -> None:
        self.next = index + 1
        self.last = stream
        self.doubtful = doubtful
        if self.updates is not None and entered is not None:
            self.tap(self.updates, index, stream.detach().float() - entered.detach().float())

    def untouched(self, stream: Tensor) -> bool:
        # Inside of a graph a tensor has no version; what hooks write in place, they are suspected of (doubtful).
        return stream is self.last and not self.doubtful

    def take_normed(self, stream: Tensor) -> Tensor | None:
        normed, self.normed = self.normed, None
        return normed if stream is self.settled else None

    def close(self) -> None:
        """End the graph: take the norms that are left, and keep no tensor, for each would be an output."""
        if self.streams is not None:
            if self.last is not None:
                self.settle(self.last)  # no final norm came by to do it
            self._take_kept()
        self.last = self.settled = self.normed = self.exit = None


class CompiledEntry:
    """An instance ``forward`` of the model, or of a wrapper around it, which takes over where dynamo is at work.

    In eager code it is one call more. Where dynamo compiles the model, it opens the call before the graph and closes
    it behind. Inside of somebody else's graph it breaks that graph, or is refused where it must not be broken.
    """

    # torch.compile(model.forward) asks for these; the name keeps dynamo from wrapping this in a frame of its own.
    __name__ = "_call_impl"

    def __init__(
        self, recorders: Recorders, model: nn.Module, body: nn.Module, layer: nn.Module, mark: str, begin: Any
    ):
        self.recorders = recorders
        self.begin = begin  # the BeginCall of the body
        self.model = model
        self.body = body
        self.layer = layer
        self.mark = mark  # what the body carries while it is patched
        self.before = model.__dict__.get("forward")
        parameters = inspect.signature(self.__wrapped__).parameters.values()
        if any(one.kind is one.VAR_POSITIONAL for one in parameters):  # a wrapper that hands everything on
            parameters = inspect.signature(type(model).forward.__get__(model)).parameters.values()
        self.names = tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)
        self._run = _own_frame()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _run=_own_frame())

    @property
    def __wrapped__(self) -> Any:
        return self.before or type(self.model).forward.__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if self._waits():
                torch._dynamo.graph_break(msg=_HOW)
            if self.before is None:  # not __wrapped__: dynamo of torch 2.11 does not trace a function's __get__
                return type(self.model).forward(self.model, *args, **kwargs)
            return self.before(*args, **kwargs)
        callback = get_eval_frame_callback()
        if not callable(callback):
            return self.__wrapped__(*args, **kwargs)
        # Here dynamo is off, for nothing of it is to be compiled; but for the forward.
        set_eval_frame(None)
        try:
            forward = self.__wrapped__
            if not self._waits():
                return _under(callback, forward, args, kwargs)
            try:
                self._open(args, kwargs)
                output = _under(callback, self._run, (forward, args, kwargs), {})
                recorder = self.recorders.own
                if recorder.call is not None and recorder.call.captured:
                    commit_captured(recorder, self.body, output)
                else:
                    recorder.commit(output)
                return output
            finally:
                if self.recorders.own.call is not None:
                    self.recorders.own.abandon()
        finally:
            set_eval_frame(callback)

    def _waits(self) -> bool:
        """Whether a call is to be recorded and none is open."""
        return (
            self.recorders.own.call is None
            and not self.body.training
            and not self.recorders.own.paused
            and getattr(self.body.__dict__.get(self.mark), "_recorders", None) is self.recorders
        )

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parameter = next(self.layer.parameters())
        where = {"device": parameter.device, "dtype": parameter.dtype}
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.begin.open(self.body, arguments, CompiledCall, where)


CompiledEntry.__code__ = CompiledEntry.__call__.__code__  # type: ignore[attr-defined]
skip_code(CompiledEntry.__call__.__code__)


def refuse_inside(module: nn.Module) -> None:
    """Raises RuntimeError where the stack of layers runs under torch.compile and nobody has opened a call for it."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg=_HOW)
    if callable(get_eval_frame_callback()):  # eager code, of what torch.compile was asked to compile
        raise RuntimeError(
            f"void_ext: {type(module).__name__} was compiled as a part of a patched model, where its trace cannot be "
            "kept. Compile the patched model itself, torch.compile(model) or model.compile(), or call "
            "void_ext.unpatch(model)"
        )


skip_code(refuse_inside.__code__)


def drop_compiled_call(model: nn.Module) -> None:
    """Forget the compiled forward that generate() keeps on the model for its next call."""
    for name in ("_compiled_call", "_last_compile_config"):
        model.__dict__.pop(name, None)


def _under(callback: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call it with dynamo on."""
    set_eval_frame(callback)
    try:
        return function(*args, **kwargs)
    finally:
        set_eval_frame(None)


skip_code(_under.__code__)


def _run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _own_frame() -> Callable[..., Any]:
    """``_run`` as code of its own, which is what dynamo keeps compiled graphs by, and counts them by.

    With one frame for all, the graphs of patches long gone would use up the few that one frame may have
    (``recompile_limit``), and each would be tried before this patch's own.
    """
    code = _run.__code__.replace(co_name=f"compiled_forward_{next(_numbers)}")
    return FunctionType(code, _run.__globals__)
