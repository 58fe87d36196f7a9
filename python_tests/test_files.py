"""Output files: what is there keeps its mode and its links, and whatever name can exist can be written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from void_ext._files import check_output, replacing


def write(path: Path, text: str, *, force: bool = False) -> None:
    with replacing(path, force=force) as temporary:
        temporary.write_text(text)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("force", [False, True])
def test_the_longest_names_can_be_written(force: bool, tmp_path: Path) -> None:
    for name in ("a" * 250 + ".json", "a." + "b" * 253, "ü" * 125 + ".json"):
        path = tmp_path / name
        write(path, "new", force=force)
        assert path.read_text() == "new"
        path.unlink()
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_is_refused_as_given(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 256)
    with pytest.raises(OSError, match=r"--out: '.*/aaa+' cannot be written: File name too long"):
        check_output(path, what="--out")


def test_a_replaced_file_leaves_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    write(path, "first")
    (tmp_path / "ordinary").touch()
    assert mode(path) == mode(tmp_path / "ordinary")
    for given in (0o600, 0o664):
        path.chmod(given)
        write(path, f"{given}", force=True)
        assert (path.read_text(), mode(path)) == (f"{given}", given)


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    target, link = elsewhere / "plan.json", folder / "plan.json"
    target.write_text("precious")
    target.chmod(0o600)
    link.symlink_to(Path("..", "elsewhere", "plan.json"))
    with pytest.raises(FileExistsError, match="exists already"):
        write(link, "new")
    assert target.read_text() == "precious"
    write(link, "new", force=True)
    assert link.is_symlink()
    assert (target.read_text(), mode(target)) == ("new", 0o600)
    target.unlink()
    write(link, "again", force=True)  # it pointed to nothing
    assert link.is_symlink()
    assert target.read_text() == "again"
    assert list(folder.iterdir()) == [link]
    assert list(elsewhere.iterdir()) == [target]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe, circle, link = tmp_path / "pipe", tmp_path / "circle", tmp_path / "link"
    os.mkfifo(pipe)
    circle.symlink_to(circle)
    link.symlink_to(tmp_path)
    for path, message in (
        (pipe, "got the device or pipe"),
        (circle, "circle' cannot be written: Too many levels"),
        (link, "got the directory"),
    ):
        with pytest.raises(OSError, match=f"path: .*{message}"):
            write(path, "new", force=True)
    assert sorted(tmp_path.iterdir()) == [circle, link, pipe]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
