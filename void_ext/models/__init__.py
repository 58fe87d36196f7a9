"""Real models for tracing: a hub id, a local directory, or ``smollm2``, a small model that comes from PyPI alone."""

from void_ext.models._common import ModelError, Progress
from void_ext.models._load import is_local, load
from void_ext.models._smollm2 import FAMILIES, smollm2

__all__ = ["FAMILIES", "ModelError", "Progress", "is_local", "load", "smollm2"]
