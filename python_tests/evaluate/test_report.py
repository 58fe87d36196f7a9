"""Tables and the picture of a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import void_ext
from void_ext.evaluate import ModeSpec, Report, Settings, TaskRun, run
from void_ext.evaluate.cells import plain, restored
from void_ext.evaluate.statistics import Metric

pytest.importorskip("lm_eval")


@pytest.fixture
def report(tiny: Any, tokenizer: Any, load: Callable[..., Any]) -> Report:
    tasks = load("choices", "telling")
    tasks["writing"] = TaskRun(load("writing")["writing"].task, seeds=(0, 1))
    plan = void_ext.VoidPlan.from_layers(6, skip=[2])
    return run(
        tiny("llama"), tokenizer, tasks, [ModeSpec.dense(), ModeSpec.exit(0.4), ModeSpec.skip(plan=plan)], Settings()
    )


def test_the_table_holds_the_numbers_of_the_json(report: Report, tmp_path: Path) -> None:
    files = report.save(tmp_path)
    document = json.loads(files["results"].read_text())
    table = files["table"].read_text()
    assert files["picture"].stat().st_size > 10_000
    for name in ("choices", "telling", "writing"):
        assert f"\n## {name}\n" in table
    for row in document["scores"]:
        assert f"{row['score']['value']:.4g}".replace("-", "−") in table
        assert (row["difference"] is None) == (row["mode"] == "dense")
        if row["difference"] is not None and row["difference"]["mcnemar_p"] is not None:
            counts = row["difference"]
            assert f"{counts['only_dense']} : {counts['only_mode']}, {counts['mcnemar_p']:.2g}" in table
    assert "| skip | 5 of 6 |" in table
    assert "| exit α=0.4 | 6 of 6 |" in table
    assert {"versions", "model", "tasks", "modes", "settings"} <= document["configuration"].keys()
    assert document["configuration"]["model"]["fingerprint"]["layers"] == 6
    assert len(document["configuration"]["tasks"]["choices"]["requests_sha256"]) == 64
    with pytest.raises(FileExistsError):
        report.save(tmp_path)
    report.save(tmp_path, force=True)


def test_every_line_of_a_table_has_as_many_cells(report: Report) -> None:
    widths: set[int] = set()
    for line in report.markdown().splitlines():
        if line.startswith("|"):
            widths.add(line.count("|"))
        elif widths:
            assert len(widths) == 1
            widths.clear()


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_the_picture_in_other_formats(report: Report, tmp_path: Path, suffix: str) -> None:
    path = report.plot(tmp_path / f"picture{suffix}")
    data = path.read_bytes()
    assert (b"exit \xce\xb1=0.4" in data) if suffix == ".svg" else data.startswith(b"%PDF")


def test_a_name_that_is_no_picture_is_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a name that ends in \.png"):
        report.plot(tmp_path / "picture.txt")


# A metric that a task gives for some answers alone, f1, beside one that every answer has.


def test_no_difference_where_no_document_has_the_metric_in_both_modes(
    make_report: Callable[..., Report], tmp_path: Path
) -> None:
    dense = {0: [{"acc": 1, "f1": 0.5}, {"acc": 0}, {"acc": 0}]}
    other = {0: [{"acc": 0}, {"acc": 0, "f1": 0.2}, {"acc": 1, "f1": 0.4}]}
    report = make_report({"a": {"dense": dense, "exit": other}})
    row = report.score("a", "exit", "f1")
    assert (row.documents, row.score.value, row.difference) == (2, pytest.approx(0.3), None)
    acc = report.score("a", "exit", "acc").difference
    assert acc is not None
    assert (acc.only_dense, acc.only_mode) == (1, 1)
    assert "| exit | f1 (2 documents) | 0.3 |" in report.save(tmp_path)["table"].read_text()


def test_no_row_where_no_document_has_the_metric_in_all_runs(
    make_report: Callable[..., Report], tmp_path: Path
) -> None:
    dense = {seed: [{"acc": 1, "f1": 0.5}, {"acc": 0, "f1": 0.1}] for seed in (0, 1)}
    other = {0: [{"acc": 1, "f1": 0.25}, {"acc": 0}], 1: [{"acc": 0}, {"acc": 0, "f1": 0.75}]}
    report = make_report({"a": {"dense": dense, "exit": other}})
    assert {row.mode for row in report.scores if row.metric == "f1"} == {"dense"}
    assert [row.seed for row in report.scores if (row.mode, row.metric) == ("exit", "acc")] == [0, 1, None]
    report.save(tmp_path)


def test_the_picture_shows_a_metric_of_all_modes(make_report: Callable[..., Report], tmp_path: Path) -> None:
    both = {
        "a": {"dense": {0: [{"f1": 0.5, "bleu": 0.1}]}, "exit": {0: [{"bleu": 0.3}]}},
        "b": {"dense": {0: [{"f1": 0.5}]}, "exit": {0: [{}]}},
        "c": {"dense": {0: [{}]}, "exit": {0: [{}]}},
    }
    report = make_report(both)
    assert [report.first_metric(task) for task in ("a", "b")] == ["bleu", "f1"]
    files = report.save(tmp_path)
    assert "No question has a metric in every run." in files["table"].read_text()
    text = report.plot(tmp_path / "picture.svg").read_text()
    assert text.count(">bleu<") == text.count(">f1<") == text.count(">no score<") == 1


@pytest.mark.parametrize("logs", [[-600.0, -700.0], [-800.0, -900.0]], ids=["near the end of floats", "beyond it"])
def test_a_perplexity_without_a_place_in_the_picture(
    make_report: Callable[..., Report], tmp_path: Path, logs: list[float]
) -> None:
    answers = [{"perplexity": value} for value in logs]
    far = {"dense": {0: answers}, "exit": {0: answers}}
    near = {"dense": {0: [{"perplexity": -1.0}, {"perplexity": -2.0}]}, "exit": {0: answers}}
    report = make_report({"far": far, "near": near}, metrics={"perplexity": Metric("perplexity")})
    files = report.save(tmp_path)
    value = report.score("near", "exit", "perplexity").score.value
    assert f"| exit | perplexity | {value:.4g} |" in files["table"].read_text()


def test_what_json_does_not_know_comes_back() -> None:
    value = {"a": [float("inf"), -0.5, (1, 2)], "b": {"c": float("nan")}, "inf": "inf"}
    back = restored(json.loads(json.dumps(plain(value), allow_nan=False)))
    assert back["a"] == [float("inf"), -0.5, [1, 2]]
    assert back["b"]["c"] != back["b"]["c"]
    assert back["inf"] == "inf"  # a text stays one
