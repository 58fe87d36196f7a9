"""A patched model: what is installed on it, what it recorded, and the way back."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from void_ext import _library, _options
from void_ext.counters import Counters
from void_ext.patching.body import BeforeFinalNorm, BeginCall, EndCall
from void_ext.patching.compiled import CompiledEntry, drop_compiled_call
from void_ext.patching.fused import FusedForward
from void_ext.patching.generation import AutoCompile, Refused, TracedGenerate, WatchedCriteria, WatchedInputs
from void_ext.patching.generic import EnterLayer, LeaveLayer
from void_ext.patching.ledger import guard_of
from void_ext.patching.norms import FinalNormForward
from void_ext.patching.recorder import Recorder, Recorders
from void_ext.patching.recording import NATIVE_DTYPES
from void_ext.patching.registry import LayerForm, rms_norm_form
from void_ext.patching.skip import SkipForward
from void_ext.patching.structure import DecoderStack
from void_ext.patching.undo import InstanceAttribute, Undo, remove_all
from void_ext.plan import Fingerprint, VoidPlan
from void_ext.store import PHASES, TraceInfo
from void_ext.trace import Trace

#: the attribute of a patched body that holds its handle
MARK = "_void_ext_handle"


def _norm_of(layer: nn.Module | None, name: str | None) -> nn.Module | None:
    return None if layer is None or name is None else getattr(layer, name)


class Handle:
    """A patched model: its trace, and the way back. Made by :func:`void_ext.patch`."""

    def __init__(
        self,
        stack: DecoderStack,
        outermost: nn.Module,
        recorders: Recorders,
        info: TraceInfo,
        fuse: str,
        form: LayerForm | None,
        why: str,
    ):
        self._stack = stack
        self._outermost = outermost  # what patch() was given: the model, or a wrapper around it
        self._recorders = recorders
        self._info = info
        self._fuse = fuse
        self._form = form
        self._why = why
        self._changes: list[Undo] = []

    def __repr__(self) -> str:
        state = "patched" if self._changes else "unpatched"
        return f"Handle({self._info.model_name!r}, mode={self.mode!r}, alpha={self.alpha}, {state})"

    def __enter__(self) -> Handle:
        if not self._changes:
            raise ValueError("model: it was unpatched already; patch it again with void_ext.patch(model)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._changes:
            self.unpatch()

    @property
    def _recorder(self) -> Recorder:
        return self._recorders.own  # of the thread that asks

    @property
    def mode(self) -> str:
        return self._info.mode

    @property
    def alpha(self) -> float:
        return self._info.alpha

    @property
    def trace(self) -> Trace | None:
        """What was recorded since the last new prompt; None before the first call. Readable after unpatching.

        Threads that share the model have a trace each: this is the one of the thread that asks. A thread that has
        none (it has not run the model since the patch or :meth:`reset`) is shown the one that any thread began last.
        """
        store, _ = self._recorder.latest
        return None if store is None else Trace(store, self._info)

    @property
    def counters(self) -> Counters | None:
        """What was launched and what was skipped, per phase, since the patch, by all threads that share the model.

        None but in mode ``"skip"``.
        """
        skipper = self._recorder.skipper
        return None if skipper is None else skipper.counters

    @property
    def plan(self) -> VoidPlan | None:
        """The plan in force: what the policy decided last, for this model. None but in mode ``"skip"``.

        That of the thread whose :attr:`trace` this one is shown.
        """
        _, skipper = self._recorder.latest
        if skipper is None:
            return None
        plan = skipper.plan
        if plan.fingerprint is not None:
            return plan
        return dataclasses.replace(plan, fingerprint=Fingerprint.of(self._stack.model))

    def reset(self) -> None:
        """Forget the trace of this thread; the next call starts a new one."""
        self._recorder.forget()

    def release(self) -> None:
        """Free what this thread's recording holds. Traces the caller keeps stay readable; ``handle.trace`` is None."""
        self._recorder.release()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the tokens of this thread's calls inside as ``"prompt"`` or ``"response"``, whatever they look like."""
        _options.check_choice("phase", name, PHASES)
        before = self._recorder.forced_phase
        self._recorder.force_phase(name)
        try:
            yield
        finally:
            self._recorder.forced_phase = before

    @contextmanager
    def real_tokens(self, mask: Tensor) -> Iterator[None]:
        """Say which tokens are real in the plain calls inside that are given no attention mask.

        For callers that pad on the right and leave the mask out, which changes no real token's output: without a word,
        all their tokens would count.

        Args:
            mask: ``[B, T]``, nonzero = real, of the shape of these calls' inputs; calls of another shape ignore it.

        Raises ValueError where ``mask`` is not two-dimensional. The model itself never sees it.
        """
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask: expected a tensor [batch, tokens], got {got}")
        before, self._recorder.real_tokens = self._recorder.real_tokens, mask
        try:
            yield
        finally:
            self._recorder.real_tokens = before

    def unpatch(self) -> None:
        """Put the model back exactly as it was found. A second call is an error."""
        if not self._changes:
            raise ValueError("model: it was unpatched already")
        try:
            self._recorder.abandon()
        finally:
            remove_all(self._changes)
        drop_compiled_call(self._stack.model)
        # A cache that generate() keeps for its next call, with layers missing in it (transformers 4.57).
        kept = self._stack.model.__dict__.get("_cache")
        if kept is not None and guard_of(kept) is not None:
            del self._stack.model._cache

    def describe(self) -> str:
        """What is watched, with which forward, and why: a few lines for a person."""
        stack, recorder = self._stack, self._recorder
        build = _library.build_info()
        device = stack.model.device.type
        dtype = stack.model.dtype
        forward = (
            f"fused (fuse={self._fuse!r})" if self._form is not None else "generic: hooks, one more pass per layer"
        )
        kernels = "native"
        if device not in recorder.recording.native_devices:
            kernels = f"plain torch, for this build has no kernels for {device}"
            if device == "cuda":
                kernels += f" ({build['cuda_reason']})"
        elif dtype not in NATIVE_DTYPES:
            kernels = f"plain torch, for there are no kernels for {str(dtype).removeprefix('torch.')}"
        return "\n".join(
            (
                f"{self._info.model_name} ({self._info.model_type}): {len(stack.layers)} layers at {stack.name}",
                f"  mode      {self.mode}, alpha {self.alpha}, granularity {self._info.granularity}"
                + (", with the quirks of the paper's code" if self._info.reference_quirks else ""),
                f"  forward   {forward}",
                f"            {self._why}",
                f"  kernels   {kernels}",
                f"  compile   {self._compiles()}",
            )
        )

    def _compiles(self) -> str:
        skipper = self._recorder.skipper
        reason = None if skipper is None else skipper.not_compiled
        if reason is not None:
            return f"no: {reason}"
        return "torch.compile(model), model.compile(), and generate() with a static cache, before patching or after"

    # ---- installing ----

    def _install(self) -> None:
        try:
            self._install_body()
            if self._form is not None:
                self._install_fused(self._form)
            else:
                self._install_generic()
            self._install_generation()
            self._install_compiled()
            self._change(self._stack.body, MARK, self)
        except BaseException:
            remove_all(self._changes)
            raise
        if self._stack.model.device.type == "cuda" and "cuda" not in self._recorder.recording.native_devices:
            warnings.warn(
                "void_ext was built without CUDA: this model is traced with plain torch operations, which cost more. "
                + _library.build_info()["cuda_reason"],
                stacklevel=3,
            )

    def _change(self, owner: Any, name: str, value: Any) -> None:
        self._changes.append(InstanceAttribute(owner, name, value))

    def _install_body(self) -> None:
        body, recorders = self._stack.body, self._recorders
        fused = None if self._form is None else self._stack.layers[0]
        begin = self._begin = BeginCall(recorders, body, fused)
        self._changes.append(body.register_forward_pre_hook(begin, with_kwargs=True))
        self._changes.append(body.register_forward_hook(EndCall(recorders), always_call=True))
        if self._stack.final_norm is not None:
            self._changes.append(self._stack.final_norm.register_forward_pre_hook(BeforeFinalNorm(recorders)))

    def _install_fused(self, form: LayerForm) -> None:
        layers = self._stack.layers
        fuse_norms = self._fuse == "norm"
        final = self._stack.final_norm if fuse_norms else None
        for index, layer in enumerate(layers):
            following = layers[index + 1] if index + 1 < len(layers) else None
            forward = (FusedForward if self._recorder.skipper is None else SkipForward)(
                layer,
                index,
                form,
                self._recorders,
                post_norm=_norm_of(layer, form.post_norm) if fuse_norms else None,
                next_norm=(_norm_of(following, form.input_norm) if following is not None else final)
                if fuse_norms
                else None,
                following=following,
            )
            # Inside of accelerate's hooks, where there are any: they bring a layer's input and weights to its device.
            self._change(layer, "_old_forward" if "_hf_hook" in layer.__dict__ else "forward", forward)
        if final is not None and rms_norm_form(final) is not None:
            self._change(final, "forward", FinalNormForward(final, self._recorders))

    def _install_generic(self) -> None:
        for index, layer in enumerate(self._stack.layers):
            enter = EnterLayer(self._recorders, index)
            self._changes.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            self._changes.append(layer.register_forward_hook(LeaveLayer(self._recorders, index)))

    def _install_compiled(self) -> None:
        stack, recorders = self._stack, self._recorders
        drop_compiled_call(stack.model)
        for model in {stack.model, self._outermost}:
            entry = CompiledEntry(recorders, model, stack.body, stack.layers[0], MARK, self._begin)
            self._change(model, "forward", entry)

    def _install_generation(self) -> None:
        model, recorders = self._stack.model, self._recorders
        for stand_in in (TracedGenerate, WatchedInputs, WatchedCriteria, AutoCompile):
            if inspect.isroutine(getattr(type(model), stand_in.name, None)):
                self._change(model, stand_in.name, stand_in(recorders, model))
        for name in ("generate_batch", "init_continuous_batching"):
            if inspect.isroutine(getattr(type(model), name, None)):
                self._change(model, name, Refused(recorders, model, name))
