"""The command line: real runs on SmolLM2."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import void_ext
from void_ext import cli, models
from void_ext.cli import _console, _timing
from void_ext.timing import Comparison, compare

ROOT = Path(void_ext.__file__).parents[1]
TRACE = ("trace", "smollm2", "--prompt", "Hi")


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
