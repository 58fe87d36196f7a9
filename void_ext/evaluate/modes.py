"""In which ways a model is evaluated: dense, early exit, layers skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from void_ext import _options

if TYPE_CHECKING:
    from void_ext.plan import VoidPlan

DENSE, EXIT, SKIP = "dense", "exit", "skip"
NAMES = (DENSE, EXIT, SKIP)


@dataclass(frozen=True)
class ModeSpec:
    """One way of running a model. Made by :meth:`dense`, :meth:`exit` and :meth:`skip`.

    Attributes:
        name: ``"dense"``, ``"exit"`` or ``"skip"``.
        label: what it is called in the report; no two modes of a run share one.
        alpha: factor of the threshold that decides (``exit``) and at which usage is told.
        options: what ``void_ext.patch`` is given.
        config: the same in JSON, for the report and to know a run again.
    """

    name: str
    label: str
    alpha: float
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def dense(cls, alpha: float = 0.8, label: str = "dense") -> ModeSpec:
        """All layers, the model's own answers; traced, so that its voids are known."""
        return cls(DENSE, label, _options.check_alpha(alpha), {"mode": "trace"}, {"mode": DENSE})

    @classmethod
    def exit(cls, alpha: float = 0.8, label: str | None = None, granularity: str = "token") -> ModeSpec:
        """The paper's early exit: all layers run, the head gets the output of each token's last active one."""
        alpha = _options.check_alpha(alpha)
        _options.check_choice("granularity", granularity, _options.GRANULARITIES)
        options = {"mode": "exit", "granularity": granularity}
        given = f"exit α={_options.alpha_text(alpha)}" + ("" if granularity == "token" else f" per {granularity}")
        return cls(EXIT, label or given, alpha, options, {"mode": EXIT, "alpha": alpha, "granularity": granularity})

    @classmethod
    def skip(
        cls,
        *,
        plan: VoidPlan | None = None,
        policy: Any = None,
        config: Mapping[str, Any] | None = None,
        label: str = "skip",
        alpha: float = 0.8,
        force: bool = False,
    ) -> ModeSpec:
        """Only what a plan or a policy says is run.

        Args:
            config: how to know a policy again, in JSON; needed with ``policy``.
            force: take a plan made for another checkpoint of the same architecture.
        """
        if (plan is None) == (policy is None):
            raise ValueError(f"plan, policy: expected one of them, got {'neither' if plan is None else 'both'}")
        known: dict[str, Any] = {"mode": SKIP}
        if plan is not None:
            known |= {"plan": plan.to_dict(), "force": force}
            options = {"mode": "skip", "plan": plan, "force": force}
        else:
            if config is None:
                raise ValueError("config: expected a description of the policy, got None")
            known |= {"policy": type(policy).__name__}
            options = {"mode": "skip", "policy": policy}
        return cls(SKIP, label, _options.check_alpha(alpha), options, known | dict(config or {}))


def check_modes(modes: Sequence[ModeSpec]) -> list[ModeSpec]:
    """``modes``, if there is something to compare with and every label is another."""
    for mode in modes:
        if not isinstance(mode, ModeSpec):
            raise TypeError(f"modes: expected ModeSpec objects, got {type(mode).__name__}")
    labels = [mode.label for mode in modes]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ValueError(f"modes: expected each label once, got {', '.join(sorted(twice))} more than once")
    if not any(mode.name == DENSE for mode in modes):
        raise ValueError(f"modes: expected a dense one, which the others are compared with, got {labels or 'none'}")
    return sorted(modes, key=lambda mode: mode.name != DENSE)
