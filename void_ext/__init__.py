"""Which layers of a language model did nothing, from the L2 norms of its residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from void_ext._lazy import names_at_first_use

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
        streams_l2norm,
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
    "Action": "plan",
    "AlreadyPatchedError": "patching",
    "CacheHoleError": "patching",
    "CostModel": "dispatch",
    "Counters": "counters",
    "Dispatched": "dispatch",
    "DivergenceError": "patching",
    "HaltPlan": "policies",
    "Handle": "patching",
    "History": "policies",
    "LibraryError": "errors",
    "PhasePlan": "plan",
    "PhaseTrace": "trace",
    "Policy": "policies",
    "PromptPlan": "policies",
    "RefreshPlan": "policies",
    "StaticPlan": "policies",
    "Trace": "trace",
    "UnsupportedModelError": "patching",
    "UsageCount": "usage",
    "VoidPlan": "plan",
    "add_l2norm": "ops",
    "add_rms_norm": "ops",
    "compact": "ops",
    "default_costs": "dispatch",
    "exit_select": "ops",
    "gather_rows": "ops",
    "handle_of": "patching",
    "keep_rows": "ops",
    "patch": "patching",
    "row_l2norm": "ops",
    "run_rows": "dispatch",
    "scatter_rows": "ops",
    "streams_l2norm": "ops",
    "unpatch": "patching",
    "void_mask": "ops",
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
    "streams_l2norm",
    "unpatch",
    "void_mask",
]

__getattr__, __dir__ = names_at_first_use(__name__, _MODULE_OF)
