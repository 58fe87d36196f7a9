"""An evaluation that one process and each of two run alike, and what of its report has to be the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import void_ext
from void_ext.evaluate import ModeSpec, Report, Settings, TaskRun, load_tasks, run
from void_ext.evaluate.protocol.sampling import PER_ITEM

SAMPLED = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}


def tasks(folder: Path) -> dict[str, Any]:
    """Of every kind of request, choices that share a row among them, and answers that are sampled in both ways."""
    found = load_tasks(["choices", "letters", "telling", "writing"], [folder])
    task = found["writing"].task
    found["drawn by item"] = TaskRun(task, {**SAMPLED, PER_ITEM: True}, seeds=(0, 1))
    found["drawn in order"] = TaskRun(task, SAMPLED)
    return found


def modes(layers: int = 6) -> list[ModeSpec]:
    """Those whose answers and counters hang on which rows share a batch among them."""
    plan = void_ext.VoidPlan.from_layers(layers, skip=[2], attention=[4])
    policy = void_ext.PromptPlan(protect_default=False, granularity="batch")
    return [
        ModeSpec.dense(),
        ModeSpec.exit(0.4, granularity="batch"),
        ModeSpec.skip(plan=plan, label="skip plan"),
        ModeSpec.skip(policy=policy, config={"granularity": "batch"}, label="skip prompt"),
    ]


def report_of(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Report:
    return run(model, tokenizer, tasks(folder), modes(), Settings(batch_size=3), **options)


def with_examples(model: Any, tokenizer: Any, folder: Path) -> Report:
    """Each prompt has examples before it, drawn for one document after the other; one batch for each process."""
    settings = Settings(batch_size=18, num_fewshot=2)
    return run(model, tokenizer, load_tasks(["choices"], [folder]), [ModeSpec.dense()], settings)


def content(report: Report) -> dict[str, Any]:
    """Everything but how long it took and in how many processes, as JSON gives it back."""
    document = report.to_dict()
    del document["environment"]
    for row in (*document["usage"], *document["cells"]):
        del row["seconds"]
    document["items"] = [cell.to_dict()["items"] for cell in report.cells]
    return dict(json.loads(json.dumps(document)))
