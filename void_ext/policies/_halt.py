"""A token goes without what lies behind its first void: decided inside the forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from void_ext import _options, ops
from void_ext._ranking import values
from void_ext._selection import SIGNALS, UPDATE_SIGNALS, Criterion
from void_ext.policies._policy import History, Policy


class HaltPlan(Policy):
    """After a token's first void its remaining layers are off (LAC, 2023).

    Decided inside the forward, token by token, by :meth:`step`. Exact, but all layers are computed; no speed is
    claimed.

    Args:
        alpha: the threshold's factor, finite and >= 0.
        min_layers: layers that run before a token may halt: voids in the layers before are not heeded.
        granularity: ``"token"``: each token halts by itself. ``"sequence"``: the tokens of a row in one forward call
            halt together, at the first void of their norms taken together (root of the sum of squares over its real
            tokens). ``"batch"``: all rows together.
        signal: what a layer is judged by. ``"delta"`` is the rule of the paper. The other ones (see
            :meth:`void_ext.VoidPlan.from_trace`) take the place of the delta in the same rule: a layer whose signal is
            below alpha times the range of the signals before it is a void.
        budget: at most so many layers are off: voids are heeded from where no more unprotected layers are left.
        protect: layers that run for halted tokens too, beside the default ones. Their own voids halt like any other.
        protect_default: the first two layers and the last one are protected.
    """

    halts = True

    def __init__(
        self,
        alpha: float = 0.8,
        *,
        min_layers: int = 1,
        granularity: str = "token",
        signal: str = "delta",
        budget: float | None = None,
        protect: Iterable[int] = (),
        protect_default: bool = True,
    ):
        if isinstance(min_layers, bool) or not isinstance(min_layers, int):
            raise TypeError(f"min_layers: expected an int >= 1, got {type(min_layers).__name__} {min_layers!r}")
        if min_layers < 1:
            raise ValueError(f"min_layers: expected an int >= 1, got {min_layers}")
        self.min_layers = min_layers
        self.granularity = _options.check_choice("granularity", granularity, _options.GRANULARITIES)
        self.signal = _options.check_choice("signal", signal, SIGNALS)
        self.needs_updates = signal in UPDATE_SIGNALS
        self.by_row = granularity != "batch"
        # Bounds and alpha alone: a criterion's other signals rank and need a budget, here all of them have a threshold.
        self.criterion = Criterion("delta", alpha, budget, None, protect, protect_default)

    def __repr__(self) -> str:
        said: dict[str, Any] = {
            "alpha": self.criterion.alpha,
            "min_layers": self.min_layers,
            "granularity": self.granularity,
            "signal": self.signal,
            "budget": self.criterion.budget,
        }
        said |= {"protect": self.criterion.protect, "protect_default": self.criterion.protect_default}
        return f"HaltPlan({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    def decide(self, history: History | None, phase: str) -> None:
        """Nothing beforehand."""
        return None

    def first(self, layers: int | None = None) -> int:
        """The first layer whose void halts; with a budget that depends on the number of layers."""
        start = self.min_layers - 1
        if self.criterion.budget is None:
            return start
        if layers is None:
            raise ValueError("layers: expected the number of layers, which a budget needs, got None")
        most, _ = self.criterion.limits(layers)
        protected = self.criterion.protected(layers)
        free = [layer for layer in range(layers) if layer not in protected]
        # Off would be all free layers behind the void: at most `most` of them may lie there.
        return start if most is None or len(free) <= most else max(start, free[len(free) - most - 1])

    def runs(self, halted: Tensor, layer: int, layers: int) -> Tensor:
        """Which rows layer ``layer`` of ``layers`` runs for, given which have halted: ``[rows]`` bool."""
        return torch.ones_like(halted) if layer in self.criterion.protected(layers) else ~halted

    def step(
        self,
        norms: Tensor,
        executed: Tensor | None,
        halted: Tensor,
        layer: int,
        layers: int | None = None,
        *,
        updates: Tensor | None = None,
        real: Tensor | None = None,
        batch: int = 1,
    ) -> Tensor:
        """Who has halted, now that layer ``layer`` ran.

        Args:
            norms: ``[rows, l + 2]`` float32 (or more columns, which are not read), the norms up to behind the layer.
            executed: ``[rows, l + 1]`` bool, the layers that ran; None: all.
            halted: ``[rows]`` bool, before this layer; it is not written to.
            layer, layers: which layer, and of how many (needed with a budget).
            updates: ``[rows, l + 1]`` float32 ``||h_{l+1} - h_l||``, for the signals that need them.
            real: ``[rows]`` bool in any shape, the tokens that count where tokens are judged together; None: all.
            batch: how many sequences the rows are, one after the other, for granularity ``"sequence"``.

        Returns ``[rows]`` bool. NaN norms and layers that did not run halt nobody. A few small ops; no wait for the
        device.
        """
        if norms.dim() != 2 or norms.shape[1] < layer + 2:
            raise ValueError(f"norms: expected [rows, {layer + 2}] for layer {layer}, got {list(norms.shape)}")
        if not self.needs_updates:
            updates = None
        elif updates is None or updates.dim() != 2 or updates.shape[1] < layer + 1:
            got = None if updates is None else list(updates.shape)
            raise ValueError(f"updates: expected [rows, {layer + 1}] with signal {self.signal!r}, got {got}")
        if layer < self.first(layers):
            return halted
        norms = norms[:, : layer + 2]
        ran = None if executed is None else executed[:, : layer + 1]
        updates = None if updates is None else updates[:, : layer + 1]
        if self.granularity == "token":
            return halted | self._void(norms, ran, updates)
        groups = batch if self.granularity == "sequence" else 1
        counted = torch.ones_like(halted) if real is None else real.reshape(-1)
        counted = counted.view(groups, -1, 1)

        def pooled(table: Tensor) -> Tensor:
            squares = torch.where(counted, table.double().square().view(groups, -1, table.shape[1]), 0.0)
            return squares.sum(1).sqrt().float()

        together = None if ran is None else (ran.view(groups, -1, layer + 1) | ~counted).all(1)
        void = self._void(pooled(norms), together, None if updates is None else pooled(updates))
        return halted | (void & counted.any(1)[:, 0])[:, None].expand(-1, counted.shape[1]).reshape(-1)

    def _void(self, norms: Tensor, ran: Tensor | None, updates: Tensor | None) -> Tensor:
        """Whether the last layer of these tables was a void: ``[rows]`` bool."""
        if self.signal == "delta":
            void = ~ops.void_mask(norms, self.criterion.alpha, ran)[:, -1]
            return void if ran is None else void & ran[:, -1]
        value = values(self.signal, norms, updates)
        if value.shape[1] == 1:  # nothing before it: the threshold is 0, and no signal lies below
            return torch.zeros_like(value[:, 0], dtype=torch.bool)
        known = torch.ones_like(value, dtype=torch.bool) if ran is None else ran
        before, told = value[:, :-1], known[:, :-1]
        high = torch.where(told, before, -torch.inf).amax(1)
        low = torch.where(told, before, torch.inf).amin(1)
        threshold = torch.where(told.any(1), self.criterion.alpha * (high - low), 0.0)
        return (value[:, -1] < threshold) & known[:, -1]
