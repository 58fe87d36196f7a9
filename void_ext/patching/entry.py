"""``patch``, ``unpatch`` and ``handle_of``: check what was asked for and choose how it is done; a `Handle` does it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from void_ext import _library, _options
from void_ext._selection import Criterion
from void_ext.dispatch import CostModel
from void_ext.patching.agreement import Agreement
from void_ext.patching.handle import MARK, Handle
from void_ext.patching.projection import key_form
from void_ext.patching.recorder import Recorders, Shared
from void_ext.patching.recording import Recording
from void_ext.patching.registry import LayerForm, common_form
from void_ext.patching.skipping import HalfBytes, Skipper
from void_ext.patching.structure import DecoderStack, UnsupportedModelError, find_decoder_stack, refuse_sharded
from void_ext.plan import VoidPlan
from void_ext.policies import Policy, StaticPlan
from void_ext.store import TraceInfo


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
        fuse: ``"add"`` fuses the norm into the closing residual add of a layer, or takes those of few rows at the end
            of a call, bit for bit the model's own output; ``"norm"`` also fuses the RMSNorms (at most 1 ulp on few
            elements), which pays in eager code and in CUDA graphs (under torch.compile not on a CPU). Used where the
            layer's own forward is known (docs/compatibility.md); elsewhere hooks take the norms.
        granularity: one verdict per ``"token"``, per ``"sequence"`` or per ``"batch"`` of each forward call.
        reference_quirks: judge as the paper's published code does (:mod:`void_ext.quirks`).
        updates: also record ``||h_{l+1} - h_l||`` (one more pass over the stream per layer).
        halves: also record the norm after each layer's attention add (fused families only; free there).
        plan: with ``mode="skip"``, what is skipped; short for ``policy=StaticPlan(plan)``.
        policy: with ``mode="skip"``, what decides from the norms so far what is skipped (:mod:`void_ext.policies`).
        force: take a plan made for a model of the same architecture with other norm weights.
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
        if MARK in module.__dict__:
            raise AlreadyPatchedError(
                f"model: {type(module).__name__} is patched already ({module.__dict__[MARK]!r}); "
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
        adds_alone=form is not None and fuse == "add" and mode != "exit" and not updates and not halves,
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
    handle = Handle(stack, outermost, Recorders(recording, skipper, Shared()), info, fuse, form, why)
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
        handle: Handle | None = module.__dict__.get(MARK)
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
