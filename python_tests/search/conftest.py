"""Tiny models and texts for the search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from void_ext.search import Passage


def sequences(count: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def two_texts() -> tuple[Passage, Passage]:
    """Three sequences of 17 random tokens of each role."""
    return (
        Passage(sequences(3, 17, seed=1), "numbers", "0" * 64, "calibration"),
        Passage(sequences(3, 17, seed=2), "numbers", "0" * 64, "held out"),
    )


@pytest.fixture
def gentle(tiny: Callable[..., Any]) -> Callable[..., Any]:
    """A tiny model whose layers add little to the stream, so that plans differ by degrees, as in trained models."""

    def build(family: str = "llama", **options: Any) -> Any:
        model = tiny(family, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(0.4)
        return model

    return build
