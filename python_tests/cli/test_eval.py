"""``void-ext eval``: what is refused before a model is loaded, and runs of a small random model from a directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import void_ext
from void_ext import cli

pytest.importorskip("lm_eval")

from void_ext.evaluate import CellStore, Report

PROMPTS = [{"prompt": word, "target": word[::-1]} for word in ("ape", "beetle", "cat", "donkey", "eel")]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task file ``echo``: five prompts, six characters of answer each."""
    data = tmp_path / "echo.jsonl"
    data.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    config = {
        "task": "echo",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    path = tmp_path / "echo.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def model(tiny_directory: Path) -> str:
    return str(tiny_directory)


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modes", "dense,halt"], "expected modes of dense, exit, skip, got 'halt'"),
        (["--modes", "exit"], "expected dense among them"),
        (["--modes", "dense,,exit"], "expected names with commas between them"),
        (["--modes", "dense,skip"], "expected one of --plan, --skip"),
        (["--modes", "dense,skip", "--plan", "a.json", "--policy", "prompt"], "got --plan and --policy"),
        (["--modes", "dense", "--plan", "a.json"], "--plan: only means something with skip among --modes"),
        (["--modes", "dense,skip", "--skip", "3", "--budget", "2"], "--budget: has no meaning with --skip"),
        (["--modes", "dense", "--granularity", "batch"], "--granularity: only means something with exit"),
        (["--alpha", "0.8,nan"], "expected a finite number >= 0, got 'nan'"),
        (["--seeds", "1,-2"], "expected a whole number from 0"),
        (["--seeds", str(2**32)], "expected whole numbers below 2^32"),
        *((["--limit", n], "expected a whole number >= 1, or a share between 0 and 1") for n in ("0", "inf", "1e400")),
        (["--batch-size", "many"], '"auto" or a whole number >= 1'),
        (["--system", "Be brief."], "--system: only means something together with --chat"),
    ],
)
def test_wrong_usage_is_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", "smollm2", "--tasks", "echo", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("never_loads")
def test_files_and_places_are_checked_before_the_model(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str) -> str:
        assert cli.main(["eval", "smollm2", "--tasks", "echo", "--task-path", str(task), *options]) == 1
        return capsys.readouterr().err

    out = str(tmp_path / "out")
    skip = ("--modes", "dense,skip", "--out", out, "--plan")
    assert "error: --plan: no plan file at nowhere.json" in refused(*skip, "nowhere.json")
    (tmp_path / "plan.json").write_text("{}")
    assert f"error: --plan: {tmp_path / 'plan.json'} is not a plan of void_ext" in refused(
        *skip, str(tmp_path / "plan.json")
    )
    assert "does not exist" in refused("--out", str(tmp_path / "gone" / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    assert "holds files and no run.json" in refused("--out", str(tmp_path / "full"))
    task.write_text(task.read_text().replace('"prompt"', '"{{prompt}}"'))
    assert "this task can run code: doc_to_text is a template" in refused("--out", out)
    assert not os.path.lexists(out)


def test_a_run_and_its_results(
    model: str, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [tmp_path / "two.json", tmp_path / "half.json"]
    void_ext.VoidPlan.from_layers(6, skip=[2, 3]).save(plans[0])
    void_ext.VoidPlan.from_layers(6, attention=[4]).save(plans[1])
    out = tmp_path / "out"
    argv = ["eval", model, "--tasks", "echo", "--task-path", str(task), "--modes", "dense,exit,skip"]
    argv += ["--alpha", "0.8,0.2", "--plan", str(plans[0]), "--plan", str(plans[1]), "--out", str(out)]
    argv += ["--device", "cpu", "--seeds", "0,1"]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert (out / "results.md").read_text() in text
    assert "| skip two | 4 of 6 |" in text
    assert "| skip half | 5.5 of 6 |" in text
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((out / "results.json").read_text())
    labels = ["dense", "exit α=0.8", "exit α=0.2", "skip two", "skip half"]
    assert [mode["label"] for mode in document["configuration"]["modes"]] == labels
    assert document["configuration"]["modes"][3]["plan"]["layers"] == 6
    assert document["configuration"]["settings"]["seeds"] == [0, 1]
    assert len(list((out / "cells").iterdir())) == 10

    # Once more: nothing is run again, and JSON says the same.
    monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda *_, **__: pytest.fail("ran again"))
    assert cli.main([*argv, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["cells"] == document["cells"]
    assert again["files"]["table"] == str(out / "results.md")
    # Another configuration in the same place is refused.
    assert cli.main([*argv, "--limit", "2"]) == 1
    said = capsys.readouterr().err
    assert "holds a run of another configuration" in said
    assert "goes on from there" not in said
    assert cli.main([*argv, "--alpha", "0.8"]) == 1
    said = capsys.readouterr().err
    assert f"modes: {', '.join(labels)} there, dense, exit α=0.8, skip two, skip half here" in said.replace("\n", " ")


def test_an_interrupted_run_says_what_is_kept(
    model: str, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.evaluator import evaluate

    calls: list[object] = []

    def interrupted(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*given, **named)

    out = tmp_path / "out"
    argv = ["eval", model, "--tasks", "echo", "--task-path", str(task), "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr("lm_eval.evaluator.evaluate", interrupted)
    assert cli.main(argv) == 130
    assert f"1 finished in {out}; the same command goes on from there" in capsys.readouterr().err
    assert cli.main(argv) == 0
    assert len(calls) == 3
    assert "| exit α=0.8 | 6 of 6 |" in capsys.readouterr().out


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("options", [[], ["--force"]])
def test_a_place_in_use_is_refused_before_the_model(
    options: list[str], task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["eval", "smollm2", "--tasks", "echo", "--task-path", str(task), "--out", str(out), *options]
    with CellStore(out) as store:
        store.begin({"model": "a"}, 1)
        before = (out / "run.json").read_bytes()
        assert cli.main(argv) == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert "expected one that no other run is using" in said
    assert "goes on from there" not in said
    assert (out / "run.json").read_bytes() == before


def test_a_place_is_kept_until_the_results_are_written(
    model: str, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save, tried = tmp_path / "out", Report.save, []

    def watched(report: Report, directory: str, force: bool = False) -> dict[str, Path]:
        with pytest.raises(ValueError, match="no other run is using"), CellStore(directory, force=True):
            pytest.fail("entered")
        tried.append(directory)
        return save(report, directory, force=force)

    monkeypatch.setattr(Report, "save", watched)
    argv = ["eval", model, "--tasks", "echo", "--task-path", str(task), "--out", str(out), "--device", "cpu"]
    assert cli.main([*argv, "--modes", "dense", "--limit", "1"]) == 0
    assert tried == [str(out)]
    with CellStore(out):
        pass


def test_alphas_that_are_near_have_names_of_their_own(
    model: str, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["eval", model, "--tasks", "echo", "--task-path", str(task), "--out", str(out), "--device", "cpu"]
    assert cli.main([*argv, "--limit", "2", "--alpha", "0.8,0.8000001"]) == 0
    text = capsys.readouterr().out
    assert "| exit α=0.8 |" in text
    assert "| exit α=0.8000001 |" in text
    document = json.loads((out / "results.json").read_text())
    assert list(document["cells"][0]["usage"]["prompt"]["active"]) == ["0.8", "0.8000001"]


@pytest.mark.parametrize(
    ("options", "label"),
    [
        (["--skip", "2", "--skip-mlp", "4"], "skip layers 2 MLP 4"),
        (["--policy", "prompt", "--budget", "2"], "skip prompt budget=2 α=0.8"),
        (["--policy", "halt", "--granularity", "sequence"], "skip halt granularity=sequence α=0.8"),
    ],
)
def test_other_ways_of_skipping(
    options: list[str], label: str, model: str, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", model, "--tasks", "echo", "--task-path", str(task), "--modes", "dense,skip", *options]
    assert cli.main([*argv, "--limit", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert f"| {label} |" in capsys.readouterr().out
