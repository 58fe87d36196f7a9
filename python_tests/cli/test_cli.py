"""The command line: what is refused and when, exit codes, and the program as a whole."""

from __future__ import annotations

import argparse
import builtins
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import void_ext
from void_ext import cli, models
from void_ext.cli import _run

ROOT = Path(void_ext.__file__).parents[1]
TRACE = ("trace", "smollm2", "--prompt", "Hi")


def usage_error(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "-0.1"], "--alpha: expected a finite number >= 0, got '-0.1'"),
        (["--alpha", "nan"], "--alpha: expected a finite number >= 0, got 'nan'"),
        (["--alpha", "inf"], "--alpha"),
        (["--alpha", "1e39"], "--alpha: expected at most 3.4028234663852886e+38, the largest number of float32, got"),
        (["--alpha", "high"], "--alpha"),
        (["--mode", "skip"], "--mode: invalid choice: 'skip'"),
        (["--granularity", "layer"], "--granularity"),
        (["--fuse", "all"], "--fuse"),
        (["--dtype", "int8"], "--dtype"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected a whole number >= 1, got '0'"),
        (["--max-new-tokens", "2.5"], "--max-new-tokens"),
        (["--sample", "--temperature", "0"], "--temperature: expected a finite number > 0"),
        (["--sample", "--top-p", "1.1"], "--top-p"),
        (["--sample", "--seed", "-1"], "--seed"),
        (["--temperature", "0.5"], "--temperature: only means something together with --sample"),
        (["--seed", "1"], "--seed: only means something together with --sample"),
        (["--no-tokens"], "argument --no-tokens: only means something together with --save"),
        (["--no-tokens", "--plot", "a.png"], "argument --no-tokens: only means something together with --save"),
        (["--force"], "argument --force: only means something together with --save or --plot"),
        (["--prompt-file", "-"], "not allowed with argument --prompt"),
    ],
)
def test_wrong_usage_is_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(*TRACE, *options) == 2
    assert message in capsys.readouterr().err


def test_no_command_and_no_prompt_are_wrong_usage() -> None:
    assert usage_error() == 2
    assert usage_error("trace", "smollm2") == 2


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "a.bmp"], "--plot: expected a name that ends in .png, .svg, .pdf, got 'a.bmp'"),
        (["--plot", "there.png"], "--plot: 'there.png' exists already"),
        (["--plot", "nowhere/a.png"], "--plot: the directory 'nowhere'"),
        (["--plot", "/proc/a.png"], "is not writable"),
        (["--plot", "."], "--plot: expected a name"),
        (["--save", "a.bin"], "--save: expected a name that ends in .safetensors"),
        (["--save", "there.safetensors"], "--save: 'there.safetensors' exists already"),
        (["--save", "directory.safetensors"], "got the directory"),
    ],
)
def test_outputs_are_refused_before_the_model_is_loaded(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there.png", "there.safetensors"):
        Path(name).write_text("mine")
    Path("directory.safetensors").mkdir()
    assert cli.main([*TRACE, *options]) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("error:") == 1
    assert "Traceback" not in output.err
    assert output.out == ""
    assert Path("there.png").read_text() == "mine"


@pytest.mark.usefixtures("never_loads")
def test_prompt_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "smollm2", "--prompt-file", str(tmp_path / "none.txt")]) == 1
    assert "none.txt: No such file" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    assert cli.main(["trace", "smollm2", "--prompt-file", str(tmp_path / "latin.txt")]) == 1
    assert "expected UTF-8 text, byte 2 is not" in capsys.readouterr().err
    assert cli.main(["trace", "smollm2", "--prompt", " \n"]) == 1
    assert "expected a prompt, got only white space" in capsys.readouterr().err


def test_prompt_comes_from_stdin_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("Wörter")
    assert _run.read_prompt(argparse.Namespace(prompt=None, prompt_file=str(tmp_path / "p.txt"))) == "Wörter"
    (tmp_path / "marked.txt").write_text("\ufeffWörter", encoding="utf-8")  # a byte order mark is none of it
    assert _run.read_prompt(argparse.Namespace(prompt=None, prompt_file=str(tmp_path / "marked.txt"))) == "Wörter"
    for name in ("p.txt", "marked.txt"):
        with open(tmp_path / name) as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert _run.read_prompt(argparse.Namespace(prompt=None, prompt_file="-")) == "Wörter"


def test_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "/no/such/model", "--prompt", "x"]) == 1
    assert "error: '/no/such/model' does not exist" in capsys.readouterr().err


# -- errors on the way ----------------------------------------------------------------------------------------


def raising(error: BaseException) -> Any:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "load", raising(KeyboardInterrupt()))
    assert cli.main(TRACE) == 130
    assert "interrupted" in capsys.readouterr().err


def test_unexpected_error_is_one_line_and_debug_shows_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", raising(ZeroDivisionError("by zero")))
    assert cli.main(TRACE) == 1
    assert "error: ZeroDivisionError: by zero (--debug shows where)" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        cli.main([*TRACE, "--debug"])


def test_library_that_is_not_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from void_ext import _library

    monkeypatch.setattr(_library, "build_info", raising(void_ext.LibraryError("not built: pip install .")))
    monkeypatch.setattr(_library, "load", raising(void_ext.LibraryError("not built: pip install .")))
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert "not built" in output
    assert "nothing can be traced: not built: pip install ." in output
    assert cli.main(TRACE) == 1
    assert "error: not built: pip install ." in capsys.readouterr().err


# -- as a program ---------------------------------------------------------------------------------------------


def test_as_a_program(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "void_ext.cli", *TRACE, "--max-new-tokens", "2", "--no-timing"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"####" in done.stdout  # an encoding without blocks
    refused = subprocess.run([*command, "--alpha", "-1"], capture_output=True, env=environment, cwd=tmp_path)
    assert refused.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from void_ext.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "print([name for name in ('torch', 'transformers', 'matplotlib', 'rich') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_reader_that_goes_away_is_no_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "void_ext.cli", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    assert process.wait() == 1


def test_rich_is_needed_and_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("rich"):
            raise ModuleNotFoundError("No module named 'rich'", name="rich")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["info"]) == 1
    assert "pip install rich" in capsys.readouterr().err
