"""Command lines that must be refused before anything is loaded."""

from __future__ import annotations

import pytest

from void_ext import models


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a model is loaded, or even looked for."""
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded"))
