"""``patch`` and ``unpatch``: choose adapters, install them, and put everything back."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from void_ext import _library, _options
from void_ext._selection import Criterion
from void_ext.counters import Counters
from void_ext.dispatch import CostModel
from void_ext.patching.agreement import Agreement
from void_ext.patching.body import BeforeFinalNorm, BeginCall, EndCall
from void_ext.patching.compiled import CompiledEntry, drop_compiled_call
from void_ext.patching.fused import FusedForward
from void_ext.patching.generation import AutoCompile, Refused, TracedGenerate, WatchedCriteria, WatchedInputs
from void_ext.patching.generic import EnterLayer, LeaveLayer
from void_ext.patching.ledger import guard_of
from void_ext.patching.norms import FinalNormForward
from void_ext.patching.projection import key_form
from void_ext.patching.recorder import Recorder, Shared
from void_ext.patching.recording import Recording
from void_ext.patching.registry import LayerForm, common_form, rms_norm_form
from void_ext.patching.skip import SkipForward
from void_ext.patching.skipping import HalfBytes, Skipper
from void_ext.patching.structure import DecoderStack, UnsupportedModelError, find_decoder_stack, refuse_sharded
from void_ext.patching.undo import InstanceAttribute, Undo, remove_all
from void_ext.plan import Fingerprint, VoidPlan
from void_ext.policies import Policy, StaticPlan
from void_ext.store import PHASES, TraceInfo
from void_ext.trace import Trace

_MARK = "_void_ext_handle"


class AlreadyPatchedError(RuntimeError):
    """The model is patched; unpatch it first."""


def patch(
    model: nn.Module,
    mode: str = "trace",
    alpha: float = 0.8,
    fuse: str = "add",
    granularity: str = "token",
    reference_quirks: bool = False,
    *,
    updates: bool = False,
    halves: bool = False,
    plan: VoidPlan | None = None,
    policy: Policy | None = None,
    force: bool = False,
    costs: CostModel | None = None,
    **unknown: Any,
) -> Handle:
    r"""Watch the residual stream of a transformers causal language model.

    ``model(...)`` and ``model.generate(...)`` go on as before and fill ``handle.trace``. The handle is a context
    manager that unpatches on exit, also on an exception.

    Args:
        model: a decoder-only ``PreTrainedModel``, or a wrapper (PEFT) around one.
        mode: ``"trace"`` runs all layers and gives the model's own output; ``"exit"`` runs all layers too, and gives
            the final norm and head of each token's last active layer (as the paper's code; it saves no time);
            ``"skip"`` runs what the plan says and launches nothing else (architectures: docs/compatibility.md).
        alpha: threshold factor, dimensionless, finite and >= 0. A trace can be read at any other alpha later; in mode
            ``"exit"`` this one decides.
        fuse: ``"add"`` fuses the norm into the closing residual add of a layer, bit for bit the model's own output;
            ``"norm"`` also fuses the RMSNorms (at most 1 ulp on few elements). Used where the layer's own forward is
            known (docs/compatibility.md); elsewhere hooks take the norms.
        granularity: one verdict per ``"token"``, per ``"sequence"`` or per ``"batch"`` of each forward call.
        reference_quirks: judge as the paper's published code does (:mod:`void_ext.quirks`).
        updates: also record ``||h_{l+1} - h_l||`` (one more pass over the stream per layer).
        halves: also record the norm after each layer's attention add (fused families only; free there).
        plan: with ``mode="skip"``, what is skipped; short for ``policy=StaticPlan(plan)``.
        policy: with ``mode="skip"``, what decides from the norms so far what is skipped (:mod:`void_ext.policies`).
        force: take a plan made for another checkpoint of the same architecture.
        costs: how ``mode="skip"`` chooses between running an MLP densely or packed where rows differ
            (:class:`void_ext.CostModel`); None: the same choice on every machine.

    Raises:
        TypeError, ValueError: an argument is not what was expected; the message names it.
        UnsupportedModelError: the model has no traceable stack of layers (a ValueError).
        AlreadyPatchedError: the model, or a part of it, is patched.
        LibraryError: the native library is not built.
        Nothing is changed when it raises.

    Cost: per layer no extra pass and no extra launch where fused; 4(L+1) + 9 bytes per token; no host synchronisation
    during a forward. Under torch.compile the graph holds tensor work alone: no recompilation per token.
    Source: arXiv 2505.14467. See docs/method.md for where it differs.
    """
    if unknown:
        known = ", ".join(name for name in inspect.signature(patch).parameters if name not in ("model", "unknown"))
        raise TypeError(f"patch: unknown option {next(iter(unknown))!r}; the options are {known}")
    _options.check_choice("mode", mode, _options.MODES)
    _options.check_choice("fuse", fuse, _options.FUSES)
    _options.check_choice("granularity", granularity, _options.GRANULARITIES)
    alpha = _options.check_alpha(alpha)
    for name, value in (
        ("reference_quirks", reference_quirks),
        ("updates", updates),
        ("halves", halves),
        ("force", force),
    ):
        _options.check_flag(name, value)
    if reference_quirks and granularity != "token":
        raise ValueError(f"granularity: expected 'token' with reference_quirks=True, got {granularity!r}")
    if mode == "skip":
        policy = _check_policy(plan, policy)
        updates = updates or bool(getattr(policy, "needs_updates", False))
        if reference_quirks:
            raise ValueError("reference_quirks: expected False with mode='skip'; the paper's code skips nothing")
    else:
        for name, given in (("plan", plan), ("policy", policy), ("costs", costs), ("force", force or None)):
            if given is not None:
                raise ValueError(f"{name}: expected mode='skip' with it, got {mode!r}")
    if costs is not None and not isinstance(costs, CostModel):
        raise TypeError(f"costs: expected a CostModel or None, got {type(costs).__name__}")
    stack = find_decoder_stack(model)
    for module in model.modules():
        if _MARK in module.__dict__:
            raise AlreadyPatchedError(
                f"model: {type(module).__name__} is patched already ({module.__dict__[_MARK]!r}); "
                "call void_ext.unpatch(model) first"
            )
    if mode == "exit" and stack.final_norm is None:
        raise UnsupportedModelError(
            f"mode: 'exit' needs the norm after the last layer, and {type(stack.body).__name__} does not show exactly "
            "one behind its layers; mode='trace' works without it"
        )
    form, why = common_form(stack.layers)
    if halves and form is None:
        raise UnsupportedModelError(f"halves: expected a model with a fused forward; {why}")
    if policy is not None:
        refuse_sharded(model)
    skipper = _skipper(stack, form, why, policy, force, costs) if policy is not None else None

    recording = Recording(
        layers=len(stack.layers),
        mode=mode,
        alpha=alpha,
        granularity=granularity,
        quirks=reference_quirks,
        updates=updates,
        halves=halves,
        skips=mode == "skip",
        defer=form is not None and fuse == "add" and mode != "exit" and not updates and not halves,
        native_devices=("cpu", "cuda") if _library.build_info()["cuda"] else ("cpu",),
    )
    info = TraceInfo(
        alpha=alpha,
        granularity=granularity,
        reference_quirks=reference_quirks,
        mode=mode,
        dtype=str(stack.model.dtype).removeprefix("torch."),
        model_type=stack.model_type,
        model_name=str(getattr(stack.model.config, "name_or_path", "") or type(stack.model).__name__),
    )
    outermost = model._orig_mod if isinstance(model, OptimizedModule) else model
    handle = Handle(stack, outermost, Recorder(recording, skipper, Shared()), info, fuse, form, why)
    handle._install()
    return handle


def unpatch(model: nn.Module) -> None:
    """Put ``model`` back exactly as :func:`patch` found it. Raises ValueError where it is not patched."""
    handle_of(model).unpatch()


def handle_of(model: nn.Module) -> Handle:
    """The handle of a patched model: of a copy (``copy.deepcopy``, ``torch.load``), say, which has one of its own.

    Raises TypeError for what is no module, ValueError where it is not patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a patched model, got {type(model).__name__}")
    for module in model.modules():
        handle: Handle | None = module.__dict__.get(_MARK)
        if handle is not None:
            return handle
    raise ValueError(f"model: {type(model).__name__} is not patched; expected a model given to void_ext.patch")


def _check_policy(plan: Any, policy: Any) -> Policy:
    if (plan is None) == (policy is None):
        got = "neither" if plan is None else "both"
        raise ValueError(f"plan, policy: expected one of them with mode='skip', got {got}")
    if plan is not None:
        if not isinstance(plan, VoidPlan):
            raise TypeError(f"plan: expected a VoidPlan (VoidPlan.load reads a file), got {type(plan).__name__}")
        return StaticPlan(plan)
    if not callable(getattr(policy, "decide", None)) or isinstance(policy, type):
        raise TypeError(
            f"policy: expected an object with a method decide(history, phase), such as StaticPlan or PromptPlan, got "
            f"{policy!r}"
        )
    return policy  # type: ignore[no-any-return]


def _skipper(
    stack: DecoderStack, form: LayerForm | None, why: str, policy: Policy, force: bool, costs: CostModel | None
) -> Skipper:
    """Raises where this model's layers cannot be skipped, or the plan is for another model."""
    if form is None:
        raise UnsupportedModelError(
            f"mode: 'skip' needs a model with a fused forward (docs/compatibility.md lists them), got model_type "
            f"{stack.model_type!r}; {why}. mode='trace' and mode='exit' work"
        )
    sizes = []
    for layer in stack.layers:
        keys, why = key_form(getattr(layer, form.attention))
        if keys is None:
            raise UnsupportedModelError(f"mode: 'skip' cannot make K and V alone for this model; {why}")
        sizes.append(HalfBytes.of(layer, form, keys))
    plan = getattr(policy, "plan", None)
    if isinstance(plan, VoidPlan):
        plan.check(stack.model, force)
    criterion = getattr(policy, "criterion", None)
    if isinstance(criterion, Criterion):  # now, not when the first prompt has been read
        criterion.protected(len(stack.layers))
        criterion.limits(len(stack.layers))
    return Skipper(policy, len(stack.layers), tuple(sizes), costs, Agreement.of(stack.layers))


def _norm_of(layer: nn.Module | None, name: str | None) -> nn.Module | None:
    return None if layer is None or name is None else getattr(layer, name)


class Handle:
    """A patched model: its trace, and the way back. Made by :func:`patch`."""

    def __init__(
        self,
        stack: DecoderStack,
        outermost: nn.Module,
        recorder: Recorder,
        info: TraceInfo,
        fuse: str,
        form: LayerForm | None,
        why: str,
    ):
        self._stack = stack
        self._outermost = outermost  # what patch() was given: the model, or a wrapper around it
        self._recorder = recorder
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
        """Free what the recording holds. Traces the caller keeps stay readable; ``handle.trace`` is None."""
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
        native = device in recorder.recording.native_devices
        forward = (
            f"fused (fuse={self._fuse!r})" if self._form is not None else "generic: hooks, one more pass per layer"
        )
        kernels = "native" if native else f"plain torch, for this build has no kernels for {device}"
        if device == "cuda" and not native:
            kernels += f" ({build['cuda_reason']})"
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
            for module in {self._stack.model, self._stack.body}:
                self._change(module, _MARK, self)
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
        body, recorder = self._stack.body, self._recorder
        fused = None if self._form is None else self._stack.layers[0]
        begin = self._begin = BeginCall(recorder, body, fused)
        self._changes.append(body.register_forward_pre_hook(begin, with_kwargs=True))
        self._changes.append(body.register_forward_hook(EndCall(recorder), always_call=True))
        if self._stack.final_norm is not None:
            self._changes.append(self._stack.final_norm.register_forward_pre_hook(BeforeFinalNorm(recorder)))

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
                self._recorder,
                post_norm=_norm_of(layer, form.post_norm) if fuse_norms else None,
                next_norm=(_norm_of(following, form.input_norm) if following is not None else final)
                if fuse_norms
                else None,
                following=following,
            )
            # Inside of accelerate's hooks, where there are any: they bring a layer's input and weights to its device.
            self._change(layer, "_old_forward" if "_hf_hook" in layer.__dict__ else "forward", forward)
        if final is not None and rms_norm_form(final) is not None:
            self._change(final, "forward", FinalNormForward(final, self._recorder))

    def _install_generic(self) -> None:
        for index, layer in enumerate(self._stack.layers):
            enter = EnterLayer(self._recorder, index)
            self._changes.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            self._changes.append(layer.register_forward_hook(LeaveLayer(self._recorder, index)))

    def _install_compiled(self) -> None:
        stack, recorder = self._stack, self._recorder
        drop_compiled_call(stack.model)
        for model in {stack.model, self._outermost}:
            entry = CompiledEntry(recorder, model, stack.body, stack.layers[0], _MARK, self._begin)
            self._change(model, "forward", entry)

    def _install_generation(self) -> None:
        model, recorder = self._stack.model, self._recorder
        for stand_in in (TracedGenerate, WatchedInputs, WatchedCriteria, AutoCompile):
            if inspect.isroutine(getattr(type(model), stand_in.name, None)):
                self._change(model, stand_in.name, stand_in(recorder, model))
        for name in ("generate_batch", "init_continuous_batching"):
            if inspect.isroutine(getattr(type(model), name, None)):
                self._change(model, name, Refused(recorder, model, name))
