"""The directory of a run: how it is begun, thrown away, and who may use it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import void_ext
from void_ext import _files
from void_ext._files import TEMPORARY
from void_ext.evaluate import Cell, CellStore

IN_USE = "directory: expected one that no other run is using, got .*; wait until that run has ended, or take another"


def cell(task: str) -> Cell:
    return Cell(task, "dense", 0, items=[], usage={}, counters=None, layers=1, requests=1, seconds=1.0)


@pytest.fixture
def unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def names(store: CellStore, configuration: dict[str, Any], batch_size: int = 1) -> list[str]:
    """The tasks of the cells that a run goes on from."""
    return sorted(task for task, _, _ in store.begin(configuration, batch_size))


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
    (tmp_path / f"{TEMPORARY}a0b1c2d3").write_text('{"format": "void_')
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


# ---- two runs ----


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("other", [{"model": "a"}, {"model": "b"}])
def test_a_run_at_work_is_left_alone(tmp_path: Path, other: dict[str, str], force: bool) -> None:
    first, second = CellStore(tmp_path), CellStore(tmp_path, force=force)
    with first:
        assert first.begin({"model": "a"}, 1) == {}
        first.add(cell("one"))
        with pytest.raises(ValueError, match=IN_USE):
            second.begin(other, 1)
        assert not second.begun
        # Known as early as that where the directory is there: no model need be read.
        with pytest.raises(ValueError, match=IN_USE), CellStore(tmp_path, force=force):
            pytest.fail("entered")
        first.add(cell("two"))
    with CellStore(tmp_path) as third:
        assert names(third, {"model": "a"}) == ["one", "two"]


def test_a_run_that_began_and_ended_meanwhile_is_known(tmp_path: Path) -> None:
    stores = [CellStore(tmp_path / "out") for _ in range(4)]
    with stores[0]:
        stores[0].begin({"model": "a"}, 8)
        stores[0].add(cell("one"))
    with stores[1], pytest.raises(ValueError, match=r"another configuration \(model: a there, b here\)"):
        stores[1].begin({"model": "b"}, 8)
    with stores[2]:
        assert names(stores[2], {"model": "a"}, 8) == ["one"]
    # Cells of one run have one batch size; which is that run's, this one knows when it is asked again.
    with (
        stores[3],
        pytest.raises(ValueError, match=r"batch size 8, begun since .* chose 4; run the same command again"),
    ):
        stores[3].begin({"model": "a"}, 4)
    assert stores[3].batch_size == 8


def test_a_refused_run_lets_go(tmp_path: Path) -> None:
    with CellStore(tmp_path) as store:
        store.begin({"model": "a"}, 1)
    with pytest.raises(ValueError, match="another configuration"), CellStore(tmp_path) as store:
        store.begin({"model": "b"}, 1)
    with CellStore(tmp_path) as store:
        assert names(store, {"model": "a"}) == []


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"""
import sys
from void_ext.evaluate import CellStore
store = CellStore({str(out)!r})
store.begin({{"model": "a"}}, 1)
print("begun", flush=True)
sys.stdin.readline()
"""
    root = str(Path(void_ext.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "begun\n"
            with pytest.raises(ValueError, match=IN_USE):
                CellStore(out).begin({"model": "a"}, 1)
        finally:
            process.kill()
    with CellStore(out) as store:
        assert names(store, {"model": "a"}) == []


def remove(out: Path) -> None:
    shutil.rmtree(out)


def replace(out: Path) -> None:
    shutil.rmtree(out)
    with CellStore(out) as store:
        store.begin({"model": "b"}, 1)


@pytest.mark.parametrize(("change", "found"), [(remove, "no run"), (replace, "another run")])
def test_nothing_is_put_into_another_runs_directory(tmp_path: Path, change: Callable[[Path], None], found: str) -> None:
    out = tmp_path / "out"
    with CellStore(out) as store:
        store.begin({"model": "a"}, 1)
        change(out)
        with pytest.raises(ValueError, match=f"to hold this run as long as it lasts, got {found}: .* give it another"):
            store.add(cell("one"))
        assert not store.begun
    assert not list(out.glob("cells/*"))


@pytest.mark.usefixtures("unlocked")
def test_without_locks_the_run_in_the_directory_is_looked_at_again(tmp_path: Path) -> None:
    first, other, same, forced = (CellStore(tmp_path, force=force) for force in (False, False, False, True))
    first.begin({"model": "a"}, 1)
    first.add(cell("one"))
    with pytest.raises(ValueError, match="another configuration"):
        other.begin({"model": "b"}, 1)
    # The same run twice does some work twice, and both keep the same.
    assert names(same, {"model": "a"}) == ["one"]
    same.add(cell("two"))
    first.add(cell("two"))
    forced.begin({"model": "b"}, 1)
    with pytest.raises(ValueError, match="got another run: it was removed or thrown away"):
        first.add(cell("three"))
    assert names(CellStore(tmp_path), {"model": "b"}) == []


@pytest.mark.usefixtures("unlocked")
def test_without_locks_one_of_two_that_begin_at_once_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = CellStore(tmp_path), CellStore(tmp_path)
    read = CellStore._read_run

    def overtaken(store: CellStore, force: bool) -> Any:
        found = read(store, force)
        if store is first:
            second.begin({"model": "b"}, 1)
            second.add(cell("one"))
        return found

    monkeypatch.setattr(CellStore, "_read_run", overtaken)
    with pytest.raises(ValueError, match=r"another began in .* just now"):
        first.begin({"model": "a"}, 1)
    assert names(second, {"model": "b"}) == ["one"]
