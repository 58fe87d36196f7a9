"""``void-ext eval --protocol``: what is refused before a model is read, presets, and a run from files to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from void_ext import cli, models
from void_ext.models import ModelError

pytest.importorskip("lm_eval")

from void_ext.evaluate import CellStore


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.fixture
def directory(tmp_path: Path, model: Any, tokenizer: Any) -> str:
    """The tiny model as a directory, as a hub repository would be."""
    place = tmp_path / "tiny"
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


WRONG = [
    (["--data-dir", "d"], "--data-dir: only means something together with --protocol"),
    (["--option-order", "paper"], "--option-order: only means something together with --protocol"),
    (["--protocol", "papers"], "--protocol: invalid choice"),
    (["--protocol", "paper", "--chat"], "--chat: a protocol says this itself"),
    (["--protocol", "paper", "--num-fewshot", "5"], "--num-fewshot: a protocol says this itself"),
    (["--protocol", "paper", "--tasks", "arc"], "--tasks: with --protocol expected some of mmlu, gpqa_diamond, boolq"),
    (["--protocol", "likelihood", "--greedy"], "--greedy: only means something with --protocol paper"),
    (["--protocol", "likelihood", "--seeds", "1"], "--seeds: only means something where answers are sampled"),
    (["--protocol", "paper", "--greedy", "--seeds", "1"], "--seeds: only means something where answers are sampled"),
    ([], "expected --tasks or --protocol"),
]


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_usage_is_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", "smollm2", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("never_loads")
def test_data_that_is_not_there_is_told_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["eval", "qwen2.5-7b", "--protocol", "paper", "--data-dir", str(tmp_path), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "hf download cais/mmlu all/test-00000-of-00001.parquet --repo-type dataset" in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama3-8b", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct"),
        ("smollm2", "smollm2"),
        ("someone/model", "someone/model"),
    ],
)
def test_presets(name: str, wanted: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(model: str, **_: Any) -> None:
        asked.append(model)
        raise ModelError("enough")

    monkeypatch.setattr(models, "load", load)
    options = ["--protocol", "paper", "--data-dir", str(data_dir), "--out", str(tmp_path / "out")]
    assert cli.main(["eval", name, *options]) == 1
    assert asked == [wanted]


def test_a_model_without_chat_template(
    directory: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(directory) / "chat_template.jinja").unlink()
    options = ["--data-dir", str(data_dir), "--tasks", "boolq", "--out", str(tmp_path / "out"), "--limit", "1"]
    assert cli.main(["eval", directory, "--protocol", "paper", *options]) == 1
    error = capsys.readouterr().err
    assert "has no chat template" in error
    assert "--protocol likelihood" in error
    assert cli.main(["eval", directory, "--protocol", "likelihood", *options]) == 0


def test_from_files_to_files(
    directory: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["eval", directory, "--protocol", "paper", "--tasks", "gpqa_diamond", "--data-dir", str(data_dir)]
    command += ["--seeds", "3,4", "--limit", "4", "--out", str(out)]
    assert cli.main(command) == 0
    told = capsys.readouterr()
    assert "note: gpqa_diamond: 12 rows; the published split has 198" in told.err
    assert "**gpqa_diamond_sampled**: 4 items" in told.out
    assert (out / "protocol.md").read_text() in told.out
    found = json.loads((out / "protocol.json").read_text())
    assert found["protocol"] == "paper"
    assert found["data"]["gpqa_diamond"]["hub_id"] == "Idavidrein/gpqa"
    runs = [("gpqa_diamond_greedy", 0), ("gpqa_diamond_sampled", 3), ("gpqa_diamond_sampled", 4)]
    modes = ["dense", "exit α=0.8"]
    assert [(s["task"], s["seed"], s["mode"]) for s in found["summaries"]] == [(*r, m) for r in runs for m in modes]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 * len(runs) * len(modes)
    for summary in found["summaries"]:
        own = [a for a in answers if all(a[k] == summary[k] for k in ("task", "seed", "mode"))]
        assert summary["unparsable"] == sum(a["chosen"] is None for a in own)
        assert summary["correct"] == sum(a["chosen"] == a["right"] for a in own)
    assert "-th term" not in (out / "answers.jsonl").read_text()

    # The same command again does nothing anew; with other data it is another run.
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["summaries"] == found["summaries"]
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before
    with (data_dir / "gpqa_diamond.jsonl").open("a") as file:
        file.write("\n")
    assert cli.main(command) == 1
    assert "holds a run of another configuration" in capsys.readouterr().err
    # --force: nothing of the old run stays beside a new one that may not get to its end.
    with CellStore(out, force=True) as store:
        store.begin({}, 1)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "cells", "run.json"]
