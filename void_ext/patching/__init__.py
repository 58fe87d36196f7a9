"""Patching transformers models: instances only, and back exactly as found. Importing this loads the op library."""

from void_ext import _library

_library.load()  # the hot path takes its ops from torch.ops as soon as it is imported

from void_ext.patching.agreement import DivergenceError  # noqa: E402
from void_ext.patching.entry import AlreadyPatchedError, handle_of, patch, unpatch  # noqa: E402
from void_ext.patching.handle import Handle  # noqa: E402
from void_ext.patching.ledger import CacheHoleError  # noqa: E402
from void_ext.patching.structure import UnsupportedModelError  # noqa: E402

__all__ = [
    "AlreadyPatchedError",
    "CacheHoleError",
    "DivergenceError",
    "Handle",
    "UnsupportedModelError",
    "handle_of",
    "patch",
    "unpatch",
]
