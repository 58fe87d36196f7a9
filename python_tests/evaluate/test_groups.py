"""A group's row: its tasks' documents pooled, where they have the metric and agree on what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from void_ext.evaluate import ModeSpec, TaskRun, load_tasks, run

pytest.importorskip("lm_eval")

WORDS = ["ape", "bee", "cat", "dog"]


@pytest.fixture
def last(tmp_path: Path, write_task: Callable[..., Path]) -> Callable[[], Any]:
    """Makes tasks ``last`` whose metrics are a share and lm-eval's perplexity, a function of the mean logarithm."""
    path = write_task(
        tmp_path,
        "last",
        [{"text": f"{word} and", "word": f" {word}"} for word in WORDS],
        output_type="loglikelihood",
        doc_to_text="text",
        doc_to_target="word",
        metric_list=[{"metric": "acc"}, {"metric": "perplexity"}],
    )
    return lambda: load_tasks(["last"], [path])["last"].task


def test_a_group_takes_a_metric_from_the_tasks_that_have_it(
    tmp_path: Path, tiny: Any, tokenizer: Any, load: Callable[..., Any], last: Callable[[], Any]
) -> None:
    """The first task knows neither perplexity (a function of a mean) nor bits per byte (of pairs)."""
    tasks = {
        "choices": TaskRun(load("choices")["choices"].task, group="all"),
        "last": TaskRun(last(), group="all"),
        "telling": TaskRun(load("telling")["telling"].task, group="all"),
    }
    report = run(tiny("llama"), tokenizer, tasks, [ModeSpec.dense(), ModeSpec.exit(0.2)])
    for name, metric in (("last", "perplexity"), ("telling", "bits_per_byte"), ("telling", "word_perplexity")):
        for mode in report.modes:
            alone, pooled = report.score(name, mode.label, metric), report.score("all", mode.label, metric)
            assert alone.score.value > 0
            assert (pooled.score, pooled.difference) == (alone.score, alone.difference)
            assert pooled.documents == report.tasks[name].documents
    assert report.score("all", "dense", "acc").documents == 12 + 4
    files = report.save(tmp_path)
    table = files["table"].read_text()
    assert "22 documents of 3 tasks" in table
    assert "| perplexity (4 documents) |" in table


def test_a_group_has_no_row_where_its_tasks_aggregate_in_different_ways(
    tmp_path: Path, tiny: Any, tokenizer: Any, last: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api import metrics

    first, second = last(), last()
    monkeypatch.setattr(first, "aggregation", lambda: {"acc": metrics.mean, "perplexity": metrics.mean})
    entries = {"one": TaskRun(first, group="both"), "two": TaskRun(second, group="both")}
    report = run(tiny("llama"), tokenizer, entries, [ModeSpec.dense()])
    assert {row.metric for row in report.scores if row.task == "both"} == {"acc"}
    one, two = (report.score(name, "dense", "perplexity").score.value for name in ("one", "two"))
    assert one < 0 < two
    monkeypatch.setattr(second, "aggregation", lambda: {"acc": metrics.median, "perplexity": metrics.perplexity})
    report = run(tiny("llama"), tokenizer, entries, [ModeSpec.dense()])
    assert not [row for row in report.scores if row.task == "both"]
    table = report.save(tmp_path)["table"].read_text()
    assert "share no metric" in table


def accuracies(*values: float) -> list[dict[str, float]]:
    return [{"acc": value} for value in values]


@pytest.mark.parametrize(
    "seeds",
    [
        {"greedy": (0,), "sampled": (0, 1, 2)},
        {"sampled": (0, 1, 2), "greedy": (0,)},
        {"greedy": (0,), "sampled": (1, 2)},
    ],
    ids=["greedy first", "sampled first", "none in common"],
)
def test_a_group_has_no_row_over_different_seeds(
    make_report: Callable[..., Any], tmp_path: Path, seeds: dict[str, tuple[int, ...]]
) -> None:
    """Whichever comes first: nothing is left out of a number that says it is the group's."""
    answers = {task: {"dense": {seed: accuracies(seed == 0, 0) for seed in own}} for task, own in seeds.items()}
    report = make_report(answers, groups={"greedy": "g", "sampled": "g"})
    assert {row.task for row in report.scores} == {"greedy", "sampled"}
    usage = {row.task: row for row in report.usage}
    assert usage["g"].tokens["prompt"] == usage["greedy"].tokens["prompt"] + usage["sampled"].tokens["prompt"]
    table = report.save(tmp_path)["table"].read_text()
    assert "4 documents of 2 tasks, seeds 0, 1, 2 (not all in every task)" in table
    assert "share no metric that they put together in the same way over the same seeds" in table


def test_a_group_has_rows_over_the_seeds_that_its_tasks_share(make_report: Callable[..., Any]) -> None:
    """In whatever order; and a metric that another task lacks does not hang on that task's seeds."""
    answers = {
        "one": {"dense": {0: accuracies(1, 0), 1: accuracies(1, 1)}},
        "two": {"dense": {1: accuracies(0, 0), 0: accuracies(0, 1)}},
        "three": {"dense": {5: [{"f1": 0.5}]}},
    }
    report = make_report(answers, groups=dict.fromkeys(answers, "g"))
    rows = [row for row in report.scores if (row.task, row.metric) == ("g", "acc")]
    assert [(row.seed, row.documents, row.score.value) for row in rows] == [(0, 4, 0.5), (1, 4, 0.5), (None, 4, 0.5)]
    assert report.score("g", "dense", "f1").score.value == 0.5
