"""Plain-torch truth for every op: same names, same signatures, same mutation."""

from void_ext.reference._ops import add_l2norm, add_rms_norm, exit_select, row_l2norm, void_mask

__all__ = ["add_l2norm", "add_rms_norm", "exit_select", "row_l2norm", "void_mask"]
