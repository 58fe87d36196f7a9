"""docs/ops.md is what its command makes of the docstrings."""

from __future__ import annotations

from pathlib import Path

import pytest

from void_ext import ops
from void_ext.testing import docs

PAGE = Path(__file__).resolve().parent.parent / "docs" / "ops.md"


def test_the_page_is_what_the_command_makes() -> None:
    assert PAGE.read_text() == docs.page()


def test_says_everything_of_every_op() -> None:
    text = docs.page()
    for name in (*ops.__all__, "run_rows"):
        entry = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for section in ("Args", "Returns", "Raises", "Numerics", "Cost"):
            assert f"**{section}.**" in entry or (name, section) in NOTHING, (name, section)
        assert f"\nvoid_ext.{name}(" in entry
        assert "``" not in entry.replace("```", "")
    assert "\n- `alpha`: finite" in text
    assert "void_ext::keep_rows(Tensor residual, Tensor update, Tensor on) -> Tensor\n" in text


NOTHING = {(op, "Returns") for op in ("row_l2norm", "streams_l2norm", "exit_select", "scatter_rows")}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "ops.md"
    assert docs.main([str(page), "--check"]) == 1
    assert docs.main([str(page)]) == 0
    assert docs.main([str(page), "--check"]) == 0
    page.write_text(page.read_text() + "by hand\n")
    assert docs.main([str(page), "--check"]) == 1
    assert "not what the docstrings say" in capsys.readouterr().out
