"""Real models for tracing: a hub id, a local directory, or ``smollm2``, a small model that comes from PyPI alone."""

from void_ext.models._common import ModelError, Progress
from void_ext.models._load import load
from void_ext.models._smollm2 import FAMILIES, smollm2

__all__ = ["FAMILIES", "ModelError", "Progress", "load", "smollm2"]
