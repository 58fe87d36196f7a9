"""Which layers of a language model did nothing, from the L2 norms of its residual stream."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from void_ext.counters import Counters
    from void_ext.dispatch import CostModel, Dispatched, default_costs, run_rows
    from void_ext.errors import LibraryError
    from void_ext.ops import (
        add_l2norm,
        add_rms_norm,
        compact,
        exit_select,
        gather_rows,
        keep_rows,
        row_l2norm,
        scatter_rows,
        void_mask,
    )
    from void_ext.patching import (
        AlreadyPatchedError,
        CacheHoleError,
        DivergenceError,
        Handle,
        UnsupportedModelError,
        handle_of,
        patch,
        unpatch,
    )
    from void_ext.plan import Action, PhasePlan, VoidPlan
    from void_ext.policies import HaltPlan, History, Policy, PromptPlan, RefreshPlan, StaticPlan
    from void_ext.trace import PhaseTrace, Trace
    from void_ext.usage import UsageCount

__version__ = "0.1.0"

# A public name is imported from its module at first use, so that `import void_ext` costs next to nothing.
_MODULE_OF = {
    "Action": "void_ext.plan",
    "AlreadyPatchedError": "void_ext.patching",
    "CacheHoleError": "void_ext.patching",
    "CostModel": "void_ext.dispatch",
    "Counters": "void_ext.counters",
    "Dispatched": "void_ext.dispatch",
    "DivergenceError": "void_ext.patching",
    "HaltPlan": "void_ext.policies",
    "Handle": "void_ext.patching",
    "History": "void_ext.policies",
    "LibraryError": "void_ext.errors",
    "PhasePlan": "void_ext.plan",
    "PhaseTrace": "void_ext.trace",
    "Policy": "void_ext.policies",
    "PromptPlan": "void_ext.policies",
    "RefreshPlan": "void_ext.policies",
    "StaticPlan": "void_ext.policies",
    "Trace": "void_ext.trace",
    "UnsupportedModelError": "void_ext.patching",
    "UsageCount": "void_ext.usage",
    "VoidPlan": "void_ext.plan",
    "add_l2norm": "void_ext.ops",
    "add_rms_norm": "void_ext.ops",
    "compact": "void_ext.ops",
    "default_costs": "void_ext.dispatch",
    "exit_select": "void_ext.ops",
    "gather_rows": "void_ext.ops",
    "handle_of": "void_ext.patching",
    "keep_rows": "void_ext.ops",
    "patch": "void_ext.patching",
    "row_l2norm": "void_ext.ops",
    "run_rows": "void_ext.dispatch",
    "scatter_rows": "void_ext.ops",
    "unpatch": "void_ext.patching",
    "void_mask": "void_ext.ops",
}

__all__ = [
    "Action",
    "AlreadyPatchedError",
    "CacheHoleError",
    "CostModel",
    "Counters",
    "Dispatched",
    "DivergenceError",
    "HaltPlan",
    "Handle",
    "History",
    "LibraryError",
    "PhasePlan",
    "PhaseTrace",
    "Policy",
    "PromptPlan",
    "RefreshPlan",
    "StaticPlan",
    "Trace",
    "UnsupportedModelError",
    "UsageCount",
    "VoidPlan",
    "add_l2norm",
    "add_rms_norm",
    "compact",
    "default_costs",
    "exit_select",
    "gather_rows",
    "handle_of",
    "keep_rows",
    "patch",
    "row_l2norm",
    "run_rows",
    "scatter_rows",
    "unpatch",
    "void_mask",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
