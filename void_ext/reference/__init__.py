"""Plain-torch truth for every op: same names, same signatures, same mutation."""

from void_ext.reference._ops import (
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

__all__ = [
    "add_l2norm",
    "add_rms_norm",
    "compact",
    "exit_select",
    "gather_rows",
    "keep_rows",
    "row_l2norm",
    "scatter_rows",
    "void_mask",
]
