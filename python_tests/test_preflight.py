"""tools/preflight.sh on machines that lack something, played by small stand-ins for python3 and c++."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "preflight.sh"


@pytest.fixture
def preflight(tmp_path: Path):
    """Runs the script with only the stand-ins and the basic tools on PATH; returns status, messages, what it wrote."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "mktemp", "cat", "rm", "grep", "head"):
        found = next(Path(folder) / name for folder in ("/usr/bin", "/bin") if (Path(folder) / name).exists())
        (tools / name).symlink_to(found)

    def stand_in(name: str, script: str) -> None:
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)

    def run(**choices: str) -> tuple[int, str, str]:
        out = tmp_path / "out"
        environment = {"PATH": str(tools), "TMPDIR": str(tmp_path), **choices}
        done = subprocess.run(["sh", str(SCRIPT), str(out)], env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr, out.read_text() if out.exists() else ""

    run.stand_in = stand_in
    return run


WHOLE_PYTHON = f'exec "{sys.executable}" "$@"'
WHOLE_COMPILER = f'PATH="{os.environ["PATH"]}" exec c++ "$@"'


def without(word: str) -> str:
    """A Python of which every check that mentions `word` fails."""
    return f'case "$*" in *{word}*) exit 1;; esac\n{WHOLE_PYTHON}'


def test_a_whole_machine_passes_and_the_choice_is_written(preflight) -> None:
    preflight.stand_in("python3", WHOLE_PYTHON)
    preflight.stand_in("c++", WHOLE_COMPILER)
    status, messages, written = preflight()
    assert (status, messages) == (0, "")
    assert written == f'PYTHON="{sys.executable}"\nCXX="c++"\n'


def test_an_empty_machine_is_told_about_python_and_compiler_at_once(preflight) -> None:
    status, messages, written = preflight()
    assert status == 1
    assert "no Python from 3.10 to 3.14 among: python3" in messages
    assert "no compiler builds C++20" in messages
    assert written == ""


@pytest.mark.parametrize(
    ("missing", "message"),
    [("Python.h", "has no Python.h. Debian, Ubuntu: apt-get install python3."), ("ensurepip", "-venv")],
)
def test_a_python_that_lacks_something_is_named_with_the_cure(preflight, missing: str, message: str) -> None:
    preflight.stand_in("python3", without(missing))
    preflight.stand_in("c++", WHOLE_COMPILER)
    status, messages, _ = preflight()
    assert status == 1
    assert message in messages
    assert len(messages.splitlines()) == 1


def test_an_old_python_is_shown_as_found(preflight) -> None:
    preflight.stand_in("python3", 'case "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac')
    preflight.stand_in("c++", WHOLE_COMPILER)
    status, messages, _ = preflight()
    assert status == 1
    assert "found: python3 is Python 3.9.2" in messages


def test_a_later_python_that_has_everything_is_preferred(preflight) -> None:
    preflight.stand_in("python3", without("Python.h"))
    preflight.stand_in("python3.11", WHOLE_PYTHON)
    preflight.stand_in("c++", WHOLE_COMPILER)
    status, messages, _ = preflight()
    assert (status, messages) == (0, "")


def test_an_old_compiler_is_passed_over_for_a_newer_one(preflight) -> None:
    preflight.stand_in("python3", WHOLE_PYTHON)
    preflight.stand_in("c++", 'echo "error: unrecognized option -std=c++20" >&2; exit 1')
    preflight.stand_in("g++-12", WHOLE_COMPILER)
    status, _, written = preflight()
    assert status == 0
    assert 'CXX="g++-12"' in written


def test_the_compiler_asked_for_is_the_only_one_tried(preflight) -> None:
    preflight.stand_in("python3", WHOLE_PYTHON)
    preflight.stand_in("c++", WHOLE_COMPILER)
    preflight.stand_in("oldcc", 'echo "error: unrecognized option -std=c++20" >&2; exit 1')
    status, messages, _ = preflight(CXX="oldcc")
    assert status == 1
    assert "(oldcc tried" in messages
    assert "it said: error: unrecognized option" in messages
