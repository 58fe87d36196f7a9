"""What docs/compatibility.md says."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from void_ext.testing import architectures

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


@pytest.fixture
def page() -> dict[str, architectures.Outcome]:
    """Outcomes by name; the test is skipped where the page was made with another transformers."""
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" not in text:
        pytest.skip(f"docs/compatibility.md is of another transformers than {transformers.__version__}")
    return {outcome.name: outcome for outcome in architectures.read_table(text)}
