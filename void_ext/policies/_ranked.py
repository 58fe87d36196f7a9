"""Policies that rank layers by what tokens showed: of the prompt once, or of every k-th token of the response."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from void_ext import _options
from void_ext._ranking import skip_table
from void_ext._selection import Criterion
from void_ext.plan import Action, PhasePlan, VoidPlan
from void_ext.policies._policy import History, Policy
from void_ext.store import PROMPT


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

    A row without a real token skips nothing. NaN norms are active. The prompt is what the current trace has of it, and
    a thread has one trace: going back to the cache of an earlier sequence begins another one, which knows nothing of
    that prompt, and the response runs dense, with a warning. Run sequences one after the other, or in threads of their
    own. Cost: a pass over the prompt's norms, and one wait for the device, at the end of the prompt.
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
        if PROMPT not in history.phases:
            warnings.warn(
                "void_ext: PromptPlan decides nothing here, for no token of the prompt is in the trace, which began in "
                "the middle of a sequence (another cache came in between, handle.reset(), a cache filled unpatched). "
                "The response runs dense; run sequences one after the other, or each in a thread of its own",
                stacklevel=2,
            )
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

    A trace that begins in the middle of a response (a thread goes back to the cache of an earlier sequence) begins a
    cycle too.

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
