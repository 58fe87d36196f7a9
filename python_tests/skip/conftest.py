"""The model that the tests of plans make plans for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def build(tiny: Callable[..., Any]) -> Callable[..., Any]:
    """``build(family="llama", **options)``: ``tiny`` with eight layers, whose norms have weights of their own."""

    def make(family: str = "llama", **options: Any) -> Any:
        return tiny(family, **{"layers": 8, "scaled_norms": True, **options})

    return make


@pytest.fixture(scope="module")
def model(build: Callable[..., Any]) -> Any:
    return build()
