"""The README's Python, run as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import void_ext
from void_ext.testing import assert_bits_equal, assert_close, tolerance

ROOT = Path(__file__).resolve().parent.parent


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README block {number}", "exec"), names)
    assert names["trace"].num_layers == 30
    assert (names["handle"].counters.response.attention_projected > 0) == (not names["handle"].plan.is_dense)
    assert void_ext.VoidPlan.load(tmp_path / "plan.json") == names["plan"]
    assert (tmp_path / "trace.png").stat().st_size > 10_000
    expected = torch.linalg.vector_norm(names["h"].double(), dim=-1)
    assert_close(names["norms"][:, 3], expected, tolerance("norm", torch.bfloat16, 576), "norms")
    assert_bits_equal(names["mixed"][~names["on"]], names["residual"][~names["on"]], "rows that are off")
    assert names["rows_computed"] in (0, int(names["on"].sum()), 8)
