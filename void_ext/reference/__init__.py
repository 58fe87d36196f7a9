"""Plain-torch truth: every op under its own name and signature, with the same mutation; and plans."""

from void_ext.reference._ops import (
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
from void_ext.reference._plans import PlanResult, run_plan

__all__ = [
    "PlanResult",
    "add_l2norm",
    "add_rms_norm",
    "compact",
    "exit_select",
    "gather_rows",
    "keep_rows",
    "row_l2norm",
    "run_plan",
    "scatter_rows",
    "streams_l2norm",
    "void_mask",
]
