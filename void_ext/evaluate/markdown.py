"""A report as Markdown tables."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from void_ext._options import alpha_text

if TYPE_CHECKING:
    from void_ext.evaluate.report import Report, ScoreRow, UsageRow

_NONE = "–"


def render(report: Report) -> str:
    """All tasks, then all groups."""
    model = report.configuration["model"]
    versions = report.configuration["versions"]
    name = model["name"]
    processes = report.environment["processes"]
    lines = [
        f"# {Path(name).name if os.path.isabs(name) else name}",
        "",
        f"{model['dtype']} on {report.environment['device']}, batch size {report.environment['batch_size']}, "
        + f"{processes} processes, " * (processes > 1)
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    for name, members in report.names.items():
        documents = sum(report.tasks[member].documents for member in members)
        what = f"{documents} document{'s' * (documents != 1)}"
        if members != [name]:
            what += f" of {len(members)} task{'s' * (len(members) != 1)}"
        seeds = list(dict.fromkeys(seed for member in members for seed in report.tasks[member].seeds))
        what += f", seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"
        if any(len(report.tasks[member].seeds) != len(seeds) for member in members):
            what += " (not all in every task)"
        lines += ["", f"## {name}", "", what, "", *_scores(report, name), "", *_layers(report, name)]
    return "\n".join(lines) + "\n"


def _scores(report: Report, name: str) -> list[str]:
    level = f"{report.confidence:.0%}".replace("%", " %")
    rows = [row for row in report.scores if row.task == name]
    seeds = len({row.seed for row in rows}) > 1
    if not rows:
        if report.names[name] == [name]:
            return ["No question has a metric in every run."]
        return ["Its tasks share no metric that they put together in the same way over the same seeds."]
    head = ["mode", *(["seed"] if seeds else []), "metric", "score", "± stderr", level, "− dense", level]
    lines = _head([*head, "only dense : only this, McNemar p"])
    documents = sum(report.tasks[member].documents for member in report.names[name])
    for row in rows:
        seed = ["all" if row.seed is None else str(row.seed)] if seeds else []
        metric = row.metric if row.documents == documents else f"{row.metric} ({row.documents} documents)"
        lines.append(_line([row.mode, *seed, metric, *_score(row)]))
    return lines


def _score(row: ScoreRow) -> list[str]:
    score, found = row.score, row.difference
    cells = [_number(score.value), _number(score.stderr), _interval(score.low, score.high)]
    if found is None:
        return [*cells, _NONE, _NONE, _NONE]
    cells += [_number(found.value, sign=True), _interval(found.low, found.high, sign=True)]
    if found.mcnemar_p is None:
        return [*cells, _NONE]
    return [*cells, f"{found.only_dense} : {found.only_mode}, {found.mcnemar_p:.2g}"]


def _layers(report: Report, name: str) -> list[str]:
    lines = _head(["mode", "layers computed", "active in the prompt", "active in the response", "tokens/s"])
    for row in report.usage:
        if row.task == name:
            active = [_active(row, phase) for phase in ("prompt", "response")]
            rate = _number(row.tokens_per_second, digits=3)
            lines.append(_line([row.mode, f"{row.computed:.4g} of {row.layers}", *active, rate]))
    return lines


def _active(row: UsageRow, phase: str) -> str:
    mean = row.mean_active(phase)
    if mean is None:
        return _NONE
    return f"{mean:.3g} of {row.layers} at α={alpha_text(row.alpha)} ({row.tokens[phase]} tokens)"


def _number(value: float | None, *, sign: bool = False, digits: int = 4) -> str:
    if value is None or math.isnan(value):
        return _NONE
    return f"{value:{'+' if sign else ''}.{digits}g}".replace("-", "−")


def _interval(low: float | None, high: float | None, *, sign: bool = False) -> str:
    if low is None or high is None:
        return _NONE
    return f"{_number(low, sign=sign)} … {_number(high, sign=sign)}"


def _head(names: list[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
