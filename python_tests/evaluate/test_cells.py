"""The directory of a run: how it is begun, thrown away, and who may use it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from void_ext import _files
from void_ext.evaluate import CellStore


@pytest.mark.parametrize("force", [False, True])
def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    place, known = tmp_path / "out", {"model": "a"}

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files, "sync", full)
    with pytest.raises(OSError, match=r"run\.json could not be .*; make room, then run the same command again$"):
        CellStore(place, force=force).begin(known, 1)
    monkeypatch.undo()
    assert CellStore(place, force=force).begin(known, 1) == {}


def test_what_a_killed_run_leaves_before_its_first_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / ".run-a0b1c2d3.json").write_text('{"format": "void_')
    assert CellStore(tmp_path).begin({}, 1) == {}
    (tmp_path / "run.json").unlink()
    (tmp_path / "cells" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds files and no run\.json"):
        CellStore(tmp_path)


def test_a_run_that_is_stopped_while_it_throws_another_away_can_throw_it_away_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CellStore(tmp_path).begin({"model": "a"}, 1)

    def stopped(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            CellStore(tmp_path, force=True).begin({"model": "b"}, 1)
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        CellStore(tmp_path).begin({"model": "b"}, 1)
    assert CellStore(tmp_path, force=True).begin({"model": "b"}, 1) == {}
