"""The fixed facts of a patch that decide what each of its calls records."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Recording:
    """What to record, and how to judge it."""

    layers: int
    mode: str
    alpha: float
    granularity: str
    quirks: bool
    updates: bool
    halves: bool
    skips: bool
    adds_alone: bool  # nothing but norms of streams is wanted of adds: they can wait, for nobody writes to the streams
    native_devices: tuple[str, ...]  # device types this build has kernels for
