"""Mode ``exit``: the output of each token's last active layer is what the final norm gets to see.

All layers run; it is the per-token early exit of the paper's code, seen in hindsight. Where no layer is active the
stream stays h_0, as there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from void_ext import quirks, reference
from void_ext.patching.recording import NATIVE_DTYPES, Recording

_exit_select: Callable[..., None] = torch.ops.void_ext.exit_select.default


class ExitSelector:
    """Follows the layers of one forward and keeps, for each token, what its last active layer gave.

    Selection only, never multiplication by a mask: a layer may give inf, and 0 * inf is NaN.
    """

    def __init__(self, stream: Tensor, norms: Tensor, batch: int, recording: Recording, real: Tensor | None = None):
        self._batch = batch
        self._recording = recording
        self._real = real  # [B, T] bool, which rows count where several are judged together
        self._dtype = stream.dtype
        self._grad = torch.is_grad_enabled()
        self.taken = False  # whether the final norm was given what was kept
        self.kept = stream if self._grad else stream.clone(memory_format=torch.contiguous_format)
        self._native = stream.device.type in recording.native_devices and not self._grad
        self._pooled = torch.empty_like(norms) if recording.granularity != "token" else norms
        self._pool(norms, 0)

    def step(self, layer: int, stream: Tensor, norms: Tensor) -> None:
        """``stream`` is what layer ``layer`` left; its norm is in column ``layer + 1``."""
        alpha = self._recording.alpha
        if self._recording.quirks:
            history = norms[:, : layer + 2].view(self._batch, -1, layer + 2).to(self._dtype)
            self._select(stream, quirks.layer_mask(history[..., 1:] - history[..., :-1], alpha))
            return
        self._pool(norms, layer + 1)
        if self._native and stream.dtype == self.kept.dtype and stream.dtype in NATIVE_DTYPES:
            _exit_select(self.kept, stream, self._pooled, layer, alpha)
        else:
            verdict = reference.void_mask(self._pooled[:, : layer + 2], alpha)[:, -1]
            self._select(stream, verdict.view(self._batch, -1))

    def _select(self, stream: Tensor, active: Tensor) -> None:
        self.kept = torch.where(active[..., None], stream, self.kept)

    def _pool(self, norms: Tensor, column: int) -> None:
        granularity = self._recording.granularity
        if granularity == "token":
            return
        squares = norms[:, column].view(self._batch, -1).double().square()
        if self._real is not None:
            squares = torch.where(self._real, squares, 0.0)
        over = 1 if granularity == "sequence" else (0, 1)
        pooled = squares.sum(over, keepdim=True).sqrt().float()
        self._pooled[:, column].view(self._batch, -1).copy_(pooled.expand_as(squares))
