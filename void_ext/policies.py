"""Policies: who decides which layers run, from what the tokens so far have shown.

Whether a layer is void is known only after it ran, so what to leave out must be predicted:

- :class:`StaticPlan`: a plan made beforehand;
- :class:`PromptPlan`: what the prompt of a sequence showed decides what its response goes without;
- :class:`RefreshPlan`: every k-th token of the response runs dense, and what it showed decides for those that follow;
- :class:`HaltPlan`: after a token's first void, its remaining layers are off.

A policy of one's own is a class with one method, which is called at the start of a trace, before the first forward of
the response, and, with ``every_token``, before every other one:

>>> import torch
>>> from void_ext import History, Policy, PhasePlan, VoidPlan
>>> class LastThird(Policy):
...     # The response goes without its last layers, but keeps their keys and values.
...     def decide(self, history, phase):
...         if history is None or phase == "prompt":
...             return None  # as before: at the start, everything runs
...         off = range(2 * history.layers // 3, history.layers - 1)
...         attention = [1 if layer in off else 2 for layer in range(history.layers)]  # PROJECT, RUN
...         mlp = [0 if layer in off else 2 for layer in range(history.layers)]  # SKIP, RUN
...         return VoidPlan(PhasePlan.dense(history.layers), PhasePlan(attention, mlp))
>>> norms = torch.ones(1, 4, 10)
>>> ran = torch.ones(1, 4, 9, dtype=torch.bool)
>>> LastThird().decide(History(norms, ran, ran[..., 0], None, [0] * 4), "response")
VoidPlan(layers=9, prompt_skipped=0, response_skipped=2)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from void_ext import _options, ops
from void_ext._ranking import skip_table, values
from void_ext._selection import SIGNALS, UPDATE_SIGNALS, Criterion
from void_ext.plan import Action, PhasePlan, VoidPlan
from void_ext.store import PHASES, PROMPT

__all__ = ["HaltPlan", "History", "Policy", "PromptPlan", "RefreshPlan", "StaticPlan", "check_decision"]


@dataclass
class History:
    """What is known of the tokens so far: views of the trace's tables, on the model's device; nothing is copied.

    Attributes:
        norms: ``[B, T, L+1]`` float32, of the residual stream before layer 0 and after each layer.
        executed: ``[B, T, L]`` bool, the layers that ran.
        mask: ``[B, T]`` bool, real tokens: no padding, nothing after a row's end.
        updates: ``[B, T, L]`` float32 ``||h_{l+1} - h_l||``; None unless the policy said ``needs_updates``.
        phases: of each of the T positions, 0 (prompt) or 1 (response); on the host.
    """

    norms: Tensor
    executed: Tensor
    mask: Tensor
    updates: Tensor | None
    phases: list[int]

    @property
    def rows(self) -> int:
        return self.norms.shape[0]

    @property
    def layers(self) -> int:
        return self.norms.shape[2] - 1

    def real(self, phase: str) -> Tensor:
        """``[B, T]`` bool, the real tokens of ``"prompt"`` or ``"response"``."""
        index = PHASES.index(_options.check_choice("phase", phase, PHASES))
        wanted = [value == index for value in self.phases]
        return self.mask if all(wanted) else self.mask & torch.tensor(wanted, device=self.mask.device)


@runtime_checkable
class Policy(Protocol):
    """What decides. Derive from it and define :meth:`decide`; the attributes say what the patch must provide for.

    Attributes:
        needs_updates: the trace must record update norms.
        every_token: ask before every forward of the response, not only before the first.
        by_row: rows of a batch can come to differ; without it, plans and tables that tell rows apart are refused.
        halts: decides inside the forward (:class:`HaltPlan`).
    """

    needs_updates: bool = False
    every_token: bool = False
    by_row: bool = False
    halts: bool = False

    @abstractmethod
    def decide(self, history: History | None, phase: str) -> VoidPlan | Tensor | None:
        """What is to run from now on.

        Called at the start of a trace (``history`` None, ``phase`` ``"prompt"``), before the first forward of the
        response (``history`` ends with the prompt, ``phase`` ``"response"``), and with ``every_token`` before each
        later forward of the response (``history`` ends with the token before).

        Returns one of:

        - None: what is in force stays so;
        - a :class:`VoidPlan`: governs from the coming forward on;
        - a bool tensor ``[B, L]`` on the model's device, True = the layer runs, False = attention PROJECT and MLP SKIP;
          or ``[B, L, 2]``, attention and MLP apart. It is copied to the host in the background and governs from the
          forward after the *next* call of ``decide``, however fast the machine: same input, same output.
        """


class StaticPlan(Policy):
    """One plan, made beforehand, for the whole trace."""

    def __init__(self, plan: VoidPlan):
        if not isinstance(plan, VoidPlan):
            raise TypeError(f"plan: expected a VoidPlan, got {type(plan).__name__}")
        self.plan = plan
        self.by_row = plan.rows is not None

    def __repr__(self) -> str:
        return f"StaticPlan({self.plan!r})"

    def decide(self, history: History | None, phase: str) -> VoidPlan | None:
        # Once: later on, rows of the plan in force may have been permuted with those of the cache.
        return self.plan if history is None or phase == "prompt" else None


class _Ranked(Policy):
    """What the policies have in common that rank layers by what tokens showed."""

    def __init__(self, criterion: Criterion, granularity: str):
        self.criterion = criterion
        self.granularity = _options.check_choice("granularity", granularity, _options.GRANULARITIES)
        self.needs_updates = criterion.needs_updates
        self.by_row = granularity != "batch"

    def _describe(self, **first: Any) -> str:
        said = {**first, **vars(self.criterion), "granularity": self.granularity}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    def _updates(self, history: History) -> Tensor | None:
        if self.needs_updates and history.updates is None:
            raise ValueError(
                f"history: signal {self.criterion.signal!r} needs the norms of updates, got none; use "
                "patch(…, updates=True)"
            )
        return history.updates if self.needs_updates else None


class PromptPlan(_Ranked):
    """The prompt runs dense; layers that were void there are off in the response.

    Off means attention PROJECT and MLP SKIP: their caches stay whole, so that the next turn may choose again.

    Args:
        alpha: the threshold's factor, for signal ``"delta"``; finite and >= 0.
        granularity: ``"token"``: each row by the share of its real prompt tokens for which a layer was void (more than
            half, or under a budget the first by share). ``"sequence"``: each row by one verdict, on the norms of its
            real prompt tokens taken together (root of the sum of squares). ``"batch"``: one verdict for all rows.
        signal, budget, at_least, protect, protect_default: as in :meth:`void_ext.VoidPlan.from_trace`; means are over
            the same tokens. Bounds hold for each row.

    A row without a real token skips nothing. NaN norms are active. Cost: a pass over the prompt's norms, and one wait
    for the device, at the end of the prompt.
    """

    def __init__(
        self,
        alpha: float = 0.8,
        granularity: str = "token",
        signal: str = "delta",
        budget: float | None = None,
        at_least: float | None = None,
        protect: Iterable[int] = (),
        protect_default: bool = True,
    ):
        super().__init__(
            Criterion(signal, alpha, budget, at_least, protect, protect_default),
            granularity,
        )

    def __repr__(self) -> str:
        return self._describe()

    def decide(self, history: History | None, phase: str) -> VoidPlan | None:
        """None for the prompt, which keeps all layers running; a plan for the response."""
        if history is None:
            return None
        dense = PhasePlan.dense(history.layers)
        if phase == "prompt":
            return VoidPlan(dense, dense)  # a prompt that continues: the last response's plan ends here
        real, updates = history.real("prompt"), self._updates(history)
        skip = skip_table(self.criterion, self.granularity, history.norms, real, history.executed, updates)
        table = skip.tolist()  # the one wait for the device
        attention = [tuple(Action.PROJECT if off else Action.RUN for off in row) for row in table]
        mlp = [tuple(Action.SKIP if off else Action.RUN for off in row) for row in table]
        return VoidPlan(dense, PhasePlan(tuple(attention), tuple(mlp)).collapse(), source=repr(self))


class RefreshPlan(_Ranked):
    """Every k-th token of the response runs dense, and what it showed governs until the next one.

    With ``every=k``, counted from the response's first token: token 0 runs dense and is traced; token 1 runs dense,
    while the verdict travels to the host; tokens 2 … k-1 go without the layers that token 0 could do without; token k
    begins the next cycle. In calls: before token 0 ``decide`` returns the dense plan, before token 1 the table of what
    token 0 showed, which governs from token 2 on, and before all others None.

    Args:
        every: the length k of a cycle, >= 3. The shares of tokens that run dense is 2 / k.
        alpha, signal, budget, at_least, protect, protect_default, granularity: as in :class:`PromptPlan`, for one token
            instead of a prompt. ``"sequence"`` is the same as ``"token"`` here; ``"batch"`` takes the norms of all
            rows' tokens together.

    Nothing here waits for the device: tables are bool ``[B, L]`` on the device of the model. NaN norms are active.
    Rows that ended go without whatever all others go without.
    """

    every_token = True

    def __init__(
        self,
        every: int,
        *,
        alpha: float = 0.8,
        granularity: str = "token",
        signal: str = "delta",
        budget: float | None = None,
        at_least: float | None = None,
        protect: Iterable[int] = (),
        protect_default: bool = True,
    ):
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every: expected a number of tokens >= 3, got {type(every).__name__} {every!r}")
        if every < 3:
            raise ValueError(f"every: expected a number of tokens >= 3 (the first two run dense), got {every}")
        super().__init__(
            Criterion(signal, alpha, budget, at_least, protect, protect_default),
            granularity,
        )
        self.every = every
        self._token = 0  # of the cycle: the one that runs next

    def __repr__(self) -> str:
        return self._describe(every=self.every)

    def decide(self, history: History | None, phase: str) -> VoidPlan | Tensor | None:
        """See the class. A cycle starts wherever a response begins: in a new trace, or after another prompt."""
        if history is None or phase == "prompt":
            self._token = 0
            return None if history is None else VoidPlan.dense(history.layers)
        if not history.phases or history.phases[-1] == PROMPT:
            self._token = 0
        token = self._token
        self._token = (token + 1) % self.every
        if token == 0:
            return VoidPlan.dense(history.layers)
        return self._table(history) if token == 1 else None

    def _table(self, history: History) -> Tensor:
        """What may run after the last token of ``history``: ``[B, L]`` bool, True = run."""
        updates = self._updates(history)
        real = history.mask[:, -1:]
        skip = skip_table(
            self.criterion,
            "token" if self.granularity == "sequence" else self.granularity,
            history.norms[:, -1:],
            real,
            history.executed[:, -1:],
            None if updates is None else updates[:, -1:],
        )
        run = ~skip.expand(history.rows, -1)
        # A row that ended would otherwise have layers run for nobody.
        return torch.where(real, run, (run & real).any(0))


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


def check_decision(
    decision: Any, rows: int, layers: int, *, device: torch.device | None = None, by_row: bool = True
) -> None:
    """Raise TypeError or ValueError where ``decision`` is not what :meth:`Policy.decide` may return.

    Args:
        decision: what a policy returned.
        rows, layers: of the batch and the model.
        device: where tables must lie; None: anywhere.
        by_row: the policy's attribute: without it, a plan must not tell rows apart.
    """
    if decision is None:
        return
    if isinstance(decision, VoidPlan):
        if decision.layers != layers:
            raise ValueError(f"decide: expected a plan for {layers} layers, got one for {decision.layers}")
        if decision.rows is not None and decision.rows != rows:
            raise ValueError(f"decide: expected a plan for {rows} rows or for all alike, got one for {decision.rows}")
        if decision.rows is not None and not by_row:
            raise ValueError("decide: expected one plan for all rows from a policy that says by_row = False")
        return
    if not isinstance(decision, Tensor):
        raise TypeError(f"decide: expected a VoidPlan, a bool tensor or None, got {type(decision).__name__}")
    if decision.dtype != torch.bool:
        raise TypeError(f"decide: expected a tensor of torch.bool, got {decision.dtype}")
    shape = tuple(decision.shape)
    if shape not in ((rows, layers), (rows, layers, 2)):
        raise ValueError(f"decide: expected a tensor [{rows}, {layers}] or [{rows}, {layers}, 2], got {list(shape)}")
    if device is not None and decision.device != device:
        raise ValueError(f"decide: expected a tensor on {device}, where the norms are, got {decision.device}")
