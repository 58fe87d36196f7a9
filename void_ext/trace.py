r"""Traces: the norms of the residual stream of every token, and what follows from them for any alpha.

With n_0 … n_L of a token, its deltas, thresholds and voids follow without running the model again:
``delta_l = n_{l+1} - n_l``, ``tau_l = alpha * (max_{j<l} delta_j - min_{j<l} delta_j)``, and layer l was active iff not
``delta_l < tau_l``.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from void_ext import _options, ops, quirks
from void_ext.store import PHASES, PROMPT, RESPONSE, TraceInfo, TraceStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PhaseTrace:
    """The rows of one phase, a snapshot of the moment it was asked for.

    Attributes:
        name: ``"prompt"`` or ``"response"``.
        norms: ``[B, T, L+1]`` float32, L2 norm of the residual stream before layer 0 and after each layer, in
            activation units. At padding positions: what the model computed.
        executed: ``[B, T, L]`` bool, the layers of which at least a half ran for the token; all of them unless layers
            were skipped. Those that did not are inactive and left out of the others' ranges; their norms are the
            stream's, which they left alone.
        tokens: ``[B, T]`` int64, the token consumed at each position; -1 where the caller gave embeddings.
        mask: ``[B, T]`` bool, real tokens: no padding, nothing from a sequence's end on.
        updates: ``[B, T, L]`` float32 ``||h_{l+1} - h_l||``, or None where they were not asked for.
        halves: ``[B, T, L]`` float32, norm of the stream after each layer's attention add, or None.
        positions: the cache positions of the T columns.
    """

    def __init__(self, store: TraceStore, info: TraceInfo, phase: int):
        self.name = PHASES[phase]
        self.info = info
        self.positions = store.positions(phase)
        self._calls = store.calls(self.positions)
        self.norms = store.read("norms", self.positions)
        self.tokens = store.read("tokens", self.positions)
        self.mask = store.read("mask", self.positions)
        self.updates = store.read("updates", self.positions) if store.has("updates") else None
        self.halves = store.read("halves", self.positions) if store.has("halves") else None
        self._executed = store.read("executed", self.positions) if store.has("executed") else None

    def __repr__(self) -> str:
        batch, tokens = self.mask.shape
        return f"PhaseTrace({self.name!r}, rows={batch}, tokens={tokens}, layers={self.num_layers})"

    @property
    def num_layers(self) -> int:
        return self.norms.shape[-1] - 1

    @property
    def executed(self) -> Tensor:
        if self._executed is not None:
            return self._executed
        return torch.ones((*self.mask.shape, self.num_layers), dtype=torch.bool, device=self.norms.device)

    def deltas(self) -> Tensor:
        """``n_{l+1} - n_l``, signed: ``[B, T, L]`` float32."""
        return self.norms[..., 1:] - self.norms[..., :-1]

    def active(self, alpha: float | None = None) -> Tensor:
        """Which layers were active: ``[B, T, L]`` bool, False = void.

        Args:
            alpha: the threshold's factor, finite and >= 0; None takes the one the model was patched with.

        Follows the granularity of the patch: with ``"sequence"`` or ``"batch"`` the norms of the real tokens of one
        forward call are taken together (root of the sum of squares) and the verdict is given to each of its tokens.
        """
        alpha = self.info.alpha if alpha is None else _options.check_alpha(alpha)
        if self.info.reference_quirks:
            return quirks.void_mask(self.norms, alpha, getattr(torch, self.info.dtype))
        if self.info.granularity == "token":
            executed = None if self._executed is None else self._executed.flatten(0, 1)
            return ops.void_mask(self.norms.flatten(0, 1), alpha, executed).view(*self.mask.shape, self.num_layers)
        group = torch.tensor(_enumerate(self._calls), dtype=torch.int64, device=self.norms.device)
        count = len(set(self._calls))
        # Chosen, not multiplied: a padded position may hold inf or NaN.
        squares = torch.where(self.mask[..., None], self.norms.double().square(), 0.0)
        pooled = squares.new_zeros(squares.shape[0], count, squares.shape[2]).index_add_(1, group, squares)
        if self.info.granularity == "batch":
            pooled = pooled.sum(0, keepdim=True)
        ran = None
        if self._executed is not None:  # by any real token of the group
            counted = (self._executed & self.mask[..., None]).to(torch.int32)
            ran = counted.new_zeros(counted.shape[0], count, counted.shape[2]).index_add_(1, group, counted)
            if self.info.granularity == "batch":
                ran = ran.sum(0, keepdim=True)
            ran = (ran > 0).flatten(0, 1)
        verdict = ops.void_mask(pooled.sqrt().float().flatten(0, 1), alpha, ran).view(
            *pooled.shape[:2], self.num_layers
        )
        verdict = verdict[:, group].expand(*self.mask.shape, self.num_layers)
        return verdict.clone() if self._executed is None else verdict & self._executed

    def usage(self, alpha: float | None = None, per: str | None = None) -> Tensor:
        """Share of real tokens for which each layer was active.

        Args:
            alpha: as in :meth:`active`.
            per: None pools the batch: ``[L]``; ``"row"`` keeps its rows apart: ``[B, L]``.

        Returns float32 in [0, 1]; NaN where there is no real token (an empty phase, a row that is all padding).
        """
        used, tokens = self.count(alpha, per)
        return used.float() / (tokens[:, None] if per == "row" else tokens).float()

    def count(self, alpha: float | None = None, per: str | None = None) -> tuple[Tensor, Tensor]:
        """What :meth:`usage` is the quotient of: real tokens for which each layer was active, and real tokens.

        Returns int64 ``[L]`` and ``[]``, or, ``per="row"``, ``[B, L]`` and ``[B]``: to be summed over batches and
        processes (:class:`void_ext.UsageCount`).
        """
        if per not in (None, "row"):
            raise ValueError(f"per: expected None or 'row', got {per!r}")
        # With the quirks, padding counts in usage too: the paper's code knows no mask.
        real = torch.ones_like(self.mask) if self.info.reference_quirks else self.mask
        over = 1 if per == "row" else (0, 1)
        return (self.active(alpha) & real[..., None]).sum(over), real.sum(over)


def _enumerate(calls: list[int]) -> list[int]:
    index: dict[int, int] = {}
    return [index.setdefault(call, len(index)) for call in calls]


def _json(value: Any) -> Any:
    """Lists of numbers, None where one is not finite."""
    if isinstance(value, list):
        return [_json(entry) for entry in value]
    return value if math.isfinite(value) else None


class Trace:
    """What a patched model recorded since the trace began: ``.prompt`` and ``.response`` (:class:`PhaseTrace`).

    A trace stays live while the model goes on with the same cache, and readable after the model was unpatched; a new
    prompt starts a new trace. Reading it is the moment at which the host waits for the device.
    """

    def __init__(self, store: TraceStore, info: TraceInfo):
        self._store = store
        self.info = info

    def __repr__(self) -> str:
        prompt, response = (len(self._store.positions(phase)) for phase in (PROMPT, RESPONSE))
        return (
            f"Trace({self.model_name or self.model_type!r}, layers={self.num_layers}, rows={self._store.batch}, "
            f"prompt={prompt}, response={response}, alpha={self.alpha})"
        )

    @property
    def prompt(self) -> PhaseTrace:
        return PhaseTrace(self._store, self.info, PROMPT)

    @property
    def response(self) -> PhaseTrace:
        return PhaseTrace(self._store, self.info, RESPONSE)

    @property
    def alpha(self) -> float:
        return self.info.alpha

    @property
    def granularity(self) -> str:
        return self.info.granularity

    @property
    def num_layers(self) -> int:
        return self._store.layers

    @property
    def model_type(self) -> str:
        return self.info.model_type

    @property
    def model_name(self) -> str:
        return self.info.model_name

    @property
    def ordered(self) -> bool:
        """False where rows were permuted on the way (beam search) and could not be followed."""
        return self._store.ordered

    def to_dict(self, alpha: float | None = None) -> dict[str, Any]:
        """The trace as plain lists and numbers, ready for ``json.dumps(allow_nan=False)``.

        Norms and updates that are not finite are None: JSON has no NaN and no infinity. ``active`` is of the numbers.
        """
        alpha = self.alpha if alpha is None else _options.check_alpha(alpha)
        result: dict[str, Any] = {
            "model_name": self.model_name,
            "model_type": self.model_type,
            "mode": self.info.mode,
            "alpha": alpha,
            "granularity": self.granularity,
            "reference_quirks": self.info.reference_quirks,
            "num_layers": self.num_layers,
            "ordered": self.ordered,
        }
        for phase in (self.prompt, self.response):
            usage: list[float] | None = phase.usage(alpha).tolist() if bool(phase.mask.any()) else None
            result[phase.name] = {
                "positions": phase.positions,
                "tokens": phase.tokens.tolist(),
                "mask": phase.mask.tolist(),
                "norms": _json(phase.norms.tolist()),
                "active": phase.active(alpha).tolist(),
                "usage": usage,
            }
            for name in ("updates", "halves"):
                if (table := getattr(phase, name)) is not None:
                    result[phase.name][name] = _json(table.tolist())
        return result

    def save(self, path: str | os.PathLike[str], tokens: bool = True, force: bool = False) -> Path:
        """Write the trace as one safetensors file (the prompt's tokens are in it unless ``tokens=False``).

        Written under a temporary name, synced, renamed. Raises FileExistsError where ``path`` exists and not ``force``.
        """
        from void_ext import _trace_file

        return _trace_file.save(self._store, self.info, _options.check_path("path", path), tokens=tokens, force=force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read what :meth:`save` wrote. Raises ValueError, naming what is wrong, for any other file."""
        from void_ext import _trace_file

        return cls(*_trace_file.load(_options.check_path("path", path)))

    def plot(
        self,
        path: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        alpha: float | None = None,
        row: int = 0,
        force: bool = False,
    ) -> Path:
        """Draw tokens x layers of both phases and usage per layer into ``path`` (png, svg or pdf)."""
        from void_ext.plot import plot_trace

        return plot_trace(self, path, tokenizer=tokenizer, alpha=alpha, row=row, force=force)
