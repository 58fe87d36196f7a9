"""What the loaders share: their error, the progress report, and the checks of ``dtype=`` and ``device=``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

# progress(what, done, total): called from time to time; `total` is 0 where the end is not known.
Progress = Callable[[str, int, int], None]

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


class ModelError(OSError):
    """A model could not be had. The message says why and what can be done instead."""


def silent(what: str, done: int, total: int) -> None:
    """The progress report nobody reads."""


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """``None`` (as stored), a torch dtype, or its name; only the three dtypes that the ops know."""
    if dtype is None:
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)} or None, got {dtype!r}")
    return found


def parse_device(device: str | torch.device | None) -> torch.device | str:
    """A device that is here; ``None`` is the first GPU or else the CPU, ``"auto"`` spreads a model over all devices."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "auto":
        if importlib.util.find_spec("accelerate") is None:
            raise ValueError('device: "auto" needs the package accelerate (pip install accelerate)')
        return "auto"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'device: expected "cpu", "cuda", "cuda:N" or "auto", got {device!r}') from None
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ValueError(
                f"device: {str(found)!r} is not here; torch {torch.__version__} sees {count} CUDA device(s)"
            )
    elif found.type != "cpu":
        raise ValueError(f'device: expected "cpu", "cuda", "cuda:N" or "auto", got {device!r}')
    return found
