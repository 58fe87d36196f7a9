"""The ops, with their documentation. Importing this loads the op library.

Code on the hot path calls ``torch.ops.void_ext.<op>.default``, which these wrap: same names, same order, and here also
the refusal of tensors that require grad.
"""

from void_ext import _library

_library.load()

from void_ext.ops._add_l2norm import add_l2norm  # noqa: E402
from void_ext.ops._add_rms_norm import add_rms_norm  # noqa: E402
from void_ext.ops._compact import compact  # noqa: E402
from void_ext.ops._exit_select import exit_select  # noqa: E402
from void_ext.ops._gather_rows import gather_rows  # noqa: E402
from void_ext.ops._keep_rows import keep_rows  # noqa: E402
from void_ext.ops._row_l2norm import row_l2norm  # noqa: E402
from void_ext.ops._scatter_rows import scatter_rows  # noqa: E402
from void_ext.ops._streams_l2norm import streams_l2norm  # noqa: E402
from void_ext.ops._void_mask import void_mask  # noqa: E402

__all__ = [
    "add_l2norm",
    "add_rms_norm",
    "compact",
    "exit_select",
    "gather_rows",
    "keep_rows",
    "row_l2norm",
    "scatter_rows",
    "streams_l2norm",
    "void_mask",
]
