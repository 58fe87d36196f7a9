"""RMSNorms that an add computes along the way, and the final norm that is handed what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from void_ext.patching.call import Call
from void_ext.patching.recorder import Recorders
from void_ext.patching.registry import NormForm, rms_norm_form

_add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = torch.ops.void_ext.add_rms_norm.default


class NormAfterAdd:
    """An RMSNorm of a known formula, which the add before it can compute."""

    def __init__(self, norm: nn.Module, form: NormForm):
        self.norm: Any = norm
        self.form = form
        self.forward = type(norm).forward

    @classmethod
    def of(cls, norm: nn.Module | None) -> NormAfterAdd | None:
        """None where there is no norm, or none that is known."""
        form = rms_norm_form(norm)
        return None if norm is None or form is None else cls(norm, form)

    @property
    def hooked(self) -> bool:
        """Whether somebody watches the module, or has replaced its forward since (Liger, kernels from the hub)."""
        norm = self.norm
        if norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__:
            return True
        return type(norm).forward is not self.forward

    @property
    def taken_over(self) -> bool:
        """The same of the final norm, which has a hook of ours and our forward while its model is patched."""
        norm = self.norm
        ours = isinstance(norm.__dict__.get("forward"), FinalNormForward) and len(norm._forward_pre_hooks) == 1
        return not ours or type(norm).forward is not self.forward

    def fits(self, call: Call, residual: Tensor, update: Tensor) -> bool:
        weight = self.norm.weight
        return (
            not call.plain
            and same_kind(residual, update)
            and self.form.weight_fits(weight, residual)
            and weight.device == residual.device
        )

    def add(self, residual: Tensor, update: Tensor, table: Tensor | None, column: int) -> tuple[Tensor, Tensor]:
        """The sum, whose norm goes to a column of ``table`` where there is one, and its RMSNorm."""
        form, norm = self.form, self.norm
        eps = getattr(norm, form.eps)
        return _add_rms_norm(residual, update, norm.weight, eps, table, column, None, form.zero_centered)


class FinalNormForward:
    """An instance ``forward`` for the norm behind the last layer: what that layer's closing add has made already, where
    nobody has touched the stream in between; the norm's own otherwise."""

    def __init__(self, norm: nn.Module, recorders: Recorders):
        self.norm = norm
        self.recorders = recorders

    @property
    def __wrapped__(self) -> Any:
        return type(self.norm).forward.__get__(self.norm)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.recorders.own.call
        if call is not None and len(args) == 1 and not kwargs and (normed := call.take_normed(args[0])) is not None:
            return normed
        # Not __wrapped__: dynamo of torch 2.11 does not trace a function's __get__.
        return type(self.norm).forward(self.norm, *args, **kwargs)


def same_kind(residual: Tensor, update: Tensor) -> bool:
    # Under autocast the update has another dtype and torch.add promotes; wrappers may return tensor subclasses.
    return (
        type(residual) is Tensor
        and type(update) is Tensor
        and residual.dtype is update.dtype
        and residual.shape == update.shape
        and residual.device == update.device
    )
