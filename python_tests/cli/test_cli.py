"""The command line: what is refused and when, exit codes, and real runs on SmolLM2."""

from __future__ import annotations

import argparse
import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import void_ext
from void_ext import cli, models
from void_ext.cli import _console, _info, _report, _run, _timing
from void_ext.timing import Comparison, compare

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


# -- info -----------------------------------------------------------------------------------------------------


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    import torch

    assert found["void_ext"] == void_ext.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["library"]["cpu_isa"] in found["library"]["cpu_isas"]
    assert len(found["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if not found["devices"]:
        assert any("the CPU kernels are used" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("arches", "capability", "expected"),
    [
        (["80", "90"], (9, 0), "sm_90"),
        (["80", "86", "89"], (8, 9), "sm_89"),
        (["80", "86"], (8, 9), "sm_86"),  # same major number, lower minor number
        (["86"], (8, 0), None),
        (["80", "120+PTX"], (9, 0), None),  # PTX of a later architecture does not help
        (["80+PTX"], (9, 0), "PTX of 80"),
        (["90a"], (9, 0), "sm_90a"),
        (["100a"], (10, 3), None),
        (["100f"], (10, 3), "sm_100f"),
        (["120+PTX"], (12, 1), "sm_120"),
        ([], (8, 0), None),
    ],
)
def test_which_devices_a_build_covers(arches: list[str], capability: tuple[int, int], expected: str | None) -> None:
    assert _info.coverage(arches, *capability) == expected


def test_notes_say_what_falls_back_and_why() -> None:
    device = {"name": "GPU X", "capability": "7.5", "covered_by": None}
    library = {"built": True, "cuda": True}
    packages: dict[str, str | None] = dict.fromkeys(("transformers", "matplotlib", "gguf"), "1")
    notes = _info._notes({"library": library, "torch_cuda": "13.0", "devices": [device], "packages": packages})
    assert len(notes) == 1
    assert "TORCH_CUDA_ARCH_LIST=7.5" in notes[0]
    packages["gguf"] = None
    without = {"built": True, "cuda": False, "cuda_reason": "no nvcc"}
    notes = _info._notes({"library": without, "torch_cuda": None, "devices": [], "packages": packages})
    assert notes == [
        "CUDA ops are not in this build: no nvcc",
        "this torch is a CPU build: the CPU kernels are used",
        "the package gguf is missing, needed by the first use of smollm2: pip install gguf",
    ]


# -- text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bars", [1, 2, 4])
@pytest.mark.parametrize("layers", [1, 30, 126])
def test_usage_fits_80_columns(
    bars: int, layers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    share = [layer / max(1, layers - 1) for layer in range(layers)]
    found = [_report.Usage(("prompt", "response")[index % 2], 0.2, 12345, share) for index in range(bars)]
    _report.print_usage(found, _console.Terminal())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + layers
    assert max(map(len, lines)) <= 80
    assert lines[-1].count("%") == bars
    if layers > 1:
        assert lines[-1].count("100%") == bars
        assert lines[2].count("  0%") == bars
        assert lines[2].count("█") == 0
        assert lines[-1].count("█") >= 4 * bars


@pytest.mark.parametrize("colour", [False, True])
def test_what_is_printed_is_not_read_as_anything(
    colour: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slices such as ``a[:m:]`` are no emoji, whatever their colons hold."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1") if colour else monkeypatch.delenv("FORCE_COLOR", raising=False)
    terminal = _console.Terminal()
    assert terminal.out.is_terminal == colour
    text = "return a[:m:], t[:100:]  # [bold] :smile:"
    for write in (terminal.print, terminal.document):
        write(text)
        assert capsys.readouterr().out == text + "\n"
    for write in (terminal.note, terminal.error):
        write(text)
        assert text in capsys.readouterr().err


def test_a_pipe_gets_every_character(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    terminal = _console.Terminal()
    text = "if x:\n\treturn 1\t# one \x07 " + "long " * 50
    for write in (terminal.print, terminal.document):
        write(text)
        assert capsys.readouterr().out == text + "\n"
    terminal.hush()
    terminal.document(text)
    terminal.print(text)
    assert capsys.readouterr().out == ""


def test_bars_survive_an_ascii_terminal() -> None:
    assert _report._bar(0.5, 8, blocks=False) == "####...."
    assert _report._bar(0.5, 8, blocks=True) == "████    "
    assert _report._bar(0.001, 8, blocks=True).strip() != ""


@pytest.mark.parametrize(
    ("high", "aa", "expected"),
    [
        (1.011, (0.995, 1.006), "resolved"),
        (1.1, (0.995, 1.006), "interval is wider"),
        # Whatever the interval of b is: what the control has to be is all that is said of it.
        (1.011, (0.995, 1.1), "the control, the same model timed against itself, has to be narrower than 0.02 and"),
        (1.011, (1.03, 1.04), "within 0.02 of 1; a quieter machine or more pairs"),
    ],
)
def test_timing_claims_no_more_than_it_can(high: float, aa: tuple[float, float], expected: str) -> None:
    timing = Comparison(1.004, 0.998, high, 1.0, *aa, 50, 0.95, "plain", "traced", [0.1], [0.2])
    text = _report.describe_timing(timing, "CPU")
    assert expected in text
    assert ("not resolvable here" in text) == (expected != "resolved")
    assert "200 ms traced, 100 ms plain" in text


# -- timing ---------------------------------------------------------------------------------------------------


class Renamed(torch.nn.Module):
    """A model that calls its cache as transformers 5.24 does, and takes no other name."""

    def forward(self, input_ids: torch.Tensor, cache: list[int] | None = None, use_cache: bool = True) -> Any:
        cache = [] if cache is None else cache
        cache += input_ids[0].tolist()
        self.seen = list(cache)
        return argparse.Namespace(cache=cache)


def test_decode_steps_go_on_with_the_cache_whatever_its_name() -> None:
    model: Any = Renamed()
    step = _timing._decoder(model, torch.tensor([[3, 4]]))
    step()
    step()
    assert model.seen == [3, 4, 4, 4]


@pytest.mark.filterwarnings("error::FutureWarning")
def test_timing_uses_nothing_deprecated(tiny: Any) -> None:
    model = tiny("llama")
    with torch.no_grad(), void_ext.patch(model) as handle:
        _timing._decoder(model, torch.tensor([[3, 4]]))()
        assert handle.trace.response.positions == [2]
    _timing._decoder(model, torch.tensor([[3, 4]]))()


# -- real runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_timing, "_PAIRS", 3)


@pytest.mark.usefixtures("quick_timing")
def test_trace_writes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    picture, saved = tmp_path / "a.png", tmp_path / "a.safetensors"
    argv = [
        "trace",
        "smollm2",
        "--prompt",
        "What is the capital of France?",
        "--max-new-tokens",
        "12",
        "--device",
        "cpu",
    ]
    assert cli.main([*argv, "--plot", str(picture), "--save", str(saved)]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("The capital of France is Paris.\n")
    assert "prompt (37)" in output.out
    assert "\x1b" not in output.out + output.err  # not a terminal: no colours, no cursor movements
    assert "3 pairs in turns" in output.out
    assert f"picture: {picture}\ntrace: {saved}\n" in output.out
    for line in ("reading SmolLM2-135M-Instruct …", "generating …", "timing against the unpatched model …"):
        assert line in output.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    trace = void_ext.Trace.load(saved)
    shown = [line.split() for line in output.out.splitlines() if line.split()[:1] == ["27"]]
    assert shown[0][-1] == f"{trace.response.usage()[27]:.0%}"
    assert trace.prompt.tokens.shape == (1, 37)
    # The same command again replaces nothing.
    assert cli.main([*argv, "--save", str(saved)]) == 1


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--max-new-tokens", "4", "--alpha", "0", "--no-timing", "--json", "--no-chat", "--dtype", "bfloat16"]
    assert cli.main([*TRACE, *argv, "--mode", "exit", "--granularity", "sequence", "--fuse", "norm"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["alpha"], found["mode"], found["granularity"], found["fuse"]) == (0, "exit", "sequence", "norm")
    assert (found["prompt"], found["new_tokens"], found["timing"]) == ("Hi", 4, None)
    assert found["prompt_tokens"] == 1  # no chat template around it
    assert [usage["phase"] for usage in found["usage"]] == ["prompt", "response"]
    assert all(len(usage["layers"]) == 30 for usage in found["usage"])


def test_sampling_is_seeded(capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in ("1", "1", "2"):
        options = ["--sample", "--temperature", "1.5", "--seed", seed, "--max-new-tokens", "8", "--no-timing", "--json"]
        assert cli.main(["trace", "smollm2", "--prompt", "Tell me a story.", *options]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1] != answers[2]


def test_prompt_longer_than_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long.txt").write_text("word " * 8200)
    assert cli.main(["trace", "smollm2", "--prompt-file", str(tmp_path / "long.txt"), "--max-new-tokens", "1"]) == 1
    assert "more than the 8192 positions of this model" in capsys.readouterr().err


def test_the_measured_model_is_left_as_found() -> None:
    model, tokenizer = models.smollm2()
    before = set(model.__dict__), {name: set(module.__dict__) for name, module in model.named_modules()}
    arguments = argparse.Namespace(mode="trace", alpha=0.8, fuse="add", granularity="token")
    ids = tokenizer("Hello", return_tensors="pt").input_ids

    def only_b_is_patched(*steps: Any, **options: Any) -> Comparison:
        # What the baseline times is the model as it came; its twin shares the weights and nothing else.
        with pytest.raises(ValueError, match="not patched"):
            void_ext.unpatch(model)
        return compare(*steps, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_timing, "_PAIRS", 2)
        patch.setattr(_timing, "compare", only_b_is_patched)
        timing = _timing.measure(arguments, _console.Terminal(), model, ids, {"mode": "trace"})
    assert timing.pairs == 2
    assert min(timing.a_seconds + timing.b_seconds) > 0
    assert before == (set(model.__dict__), {name: set(module.__dict__) for name, module in model.named_modules()})


def test_demo_leaves_a_picture_and_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--no-timing", "--max-new-tokens", "6"]
    assert cli.main(["demo", *options]) == 0
    output = capsys.readouterr().out
    assert "α = 0.8" in output
    assert "voids at α = 0.2, response:" in output
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == ["void-demo.png", "void-demo.safetensors"]

    Path("void-demo-2.png").write_text("mine")
    assert cli.main(["demo", *options]) == 0
    assert "writing void-demo-3" in capsys.readouterr().err
    names = {"void-demo-2.png", "void-demo-3.png", "void-demo-3.safetensors", *first}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert {name: Path(name).read_bytes() for name in first} == first

    Path("void-demo.png").write_text("old")
    assert cli.main(["demo", *options, "--force"]) == 0
    assert Path("void-demo.png").read_bytes().startswith(b"\x89PNG")


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
