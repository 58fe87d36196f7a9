"""Patching transformers models: instances only, and back exactly as found."""

from void_ext.patching.handle import AlreadyPatchedError, Handle, patch, unpatch
from void_ext.patching.structure import UnsupportedModelError

__all__ = ["AlreadyPatchedError", "Handle", "UnsupportedModelError", "patch", "unpatch"]
