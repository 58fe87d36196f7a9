"""A plan made beforehand."""

from __future__ import annotations

from void_ext.plan import VoidPlan
from void_ext.policies._policy import History, Policy


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
