"""What an evaluation found: scores and differences per task and mode, usage, and how they are written down."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from void_ext._files import replacing
from void_ext.evaluate.cells import FORMAT, VERSION, Cell
from void_ext.evaluate.modes import DENSE, ModeSpec
from void_ext.evaluate.statistics import Difference, Metric, Score, difference, score
from void_ext.evaluate.tally import pool
from void_ext.store import PHASES

#: What the picture shows where a task has several metrics.
_FIRST_METRICS = ("acc", "exact_match", "word_perplexity")


@dataclass(frozen=True)
class TaskInfo:
    """What identifies a task of a run, and how its metrics are aggregated."""

    name: str
    group: str | None
    seeds: tuple[int, ...]
    documents: int
    requests_sha256: str
    config: dict[str, Any]
    generation: dict[str, Any]
    metrics: Mapping[str, Metric] = field(repr=False)
    higher_is_better: dict[str, bool]

    def to_dict(self) -> dict[str, Any]:
        names = (entry.name for entry in dataclasses.fields(self) if entry.name != "metrics")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one task (or of a group's pooled documents) in one mode.

    A group has a row for a metric where all of its tasks that have the metric aggregate it in the same way, over the
    same seeds. A mode has rows where at least one document has the metric in the runs of all seeds.

    Attributes:
        documents: those that have the metric, in every run of the row; of a group those of such tasks alone.
        seed: of a single run; None: all of them, documents kept together.
        difference: to the dense mode of the same seed, over the documents that have the metric in both; None for that
            mode itself, and where there are none.
    """

    task: str
    metric: str
    mode: str
    seed: int | None
    documents: int
    score: Score
    difference: Difference | None


@dataclass(frozen=True)
class UsageRow:
    """What the layers did in one task (or group) and mode, over all seeds.

    Attributes:
        alpha: at which ``active`` is told.
        tokens, active: per phase: real tokens; per layer the share of them for which it was active.
        computed: layers launched per forward call, a half as 0.5.
        seconds: of lm-eval's request loops. They are not timed in turns: compare speeds with ``void-ext generate``.
    """

    task: str
    mode: str
    alpha: float
    layers: int
    tokens: dict[str, int]
    active: dict[str, list[float]]
    computed: float
    seconds: float

    def mean_active(self, phase: str) -> float | None:
        """Active layers of a token of this phase, on average; None without a token."""
        return sum(self.active[phase]) if self.tokens[phase] else None

    def mean_active_of_all(self) -> float:
        """Active layers of a token, on average over both phases; NaN without a token."""
        total = sum(self.tokens.values())
        return sum(self.tokens[name] * sum(self.active[name]) for name in PHASES if self.tokens[name]) / (
            total or math.nan
        )

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens.values()) / self.seconds if self.seconds else math.nan


@dataclass
class Report:
    """All cells of a run and what follows from them."""

    cells: list[Cell]
    tasks: Mapping[str, TaskInfo]
    modes: list[ModeSpec]
    configuration: dict[str, Any]
    environment: dict[str, Any]
    confidence: float = 0.95

    # ---- what follows ----

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """Tasks and, after them, groups, with the tasks in each."""
        found = {name: [name] for name in self.tasks}
        for name, info in self.tasks.items():
            if info.group is not None:
                found.setdefault(info.group, []).append(name)
        return found

    @cached_property
    def scores(self) -> list[ScoreRow]:
        """Every metric of every task, then every group, in every mode; a row a seed and, of several, one for all."""
        return [row for name, members in self.names.items() for row in self._scores(name, members)]

    @cached_property
    def usage(self) -> list[UsageRow]:
        """What the layers did, per task and mode."""
        return [self._usage(name, members, mode) for name, members in self.names.items() for mode in self.modes]

    def score(self, task: str, mode: str, metric: str) -> ScoreRow:
        """The row of a task in a mode: over all seeds. Raises KeyError where there is none."""
        rows = [row for row in self.scores if (row.task, row.mode, row.metric) == (task, mode, metric)]
        if not rows:
            raise KeyError(f"no metric {metric!r} of task {task!r} in mode {mode!r}")
        return rows[-1]

    def first_metric(self, task: str) -> str:
        """The metric that stands for a task where there is room for one: of those of all modes, if there are any."""
        modes: dict[str, set[str]] = {}
        for row in self.scores:
            if row.task == task:
                modes.setdefault(row.metric, set()).add(row.mode)
        given = [metric for metric in modes if len(modes[metric]) == len(self.modes)] or list(modes)
        if not given:
            raise KeyError(f"no metric of {task!r} that its tasks put together in the same way over the same seeds")
        return next((metric for name in _FIRST_METRICS for metric in given if metric.split(",")[0] == name), given[0])

    def _scores(self, name: str, members: list[str]) -> Iterator[ScoreRow]:
        cells = {cell.key: cell for cell in self.cells if cell.task in members}
        # Of each metric the tasks whose documents have it; a group's tasks need not have the same ones.
        having: dict[str, dict[str, None]] = {}
        for cell in cells.values():
            for metric in dict.fromkeys(metric for item in cell.items for metric in item.metrics):
                having.setdefault(metric, {})[cell.task] = None
        for metric, tasks in having.items():
            if metric.split(",")[0] == "bypass":
                continue
            how, *others = [self.tasks[task].metrics[metric] for task in tasks]
            if not all(how.agrees_with(other) for other in others):
                continue  # one number for logarithms and shares, say, would mean nothing
            seeds = self.tasks[next(iter(tasks))].seeds
            if any(set(self.tasks[task].seeds) != set(seeds) for task in tasks):
                continue  # nor one for documents of which some were asked once and others three times
            dense = None
            for mode in self.modes:
                runs = [_values(cells, list(tasks), mode.label, seed, metric) for seed in seeds]
                if not _common(runs):
                    continue
                dense = runs if mode.name == DENSE and dense is None else dense
                compared = None if dense is runs else dense
                if len(seeds) > 1:
                    for index, seed in enumerate(seeds):
                        against = None if compared is None else compared[index : index + 1]
                        yield self._row(name, metric, mode, seed, how, runs[index : index + 1], against)
                yield self._row(name, metric, mode, seeds[0] if len(seeds) == 1 else None, how, runs, compared)

    def _row(
        self,
        name: str,
        metric: str,
        mode: ModeSpec,
        seed: int | None,
        how: Metric,
        runs: Sequence[Mapping[Any, Any]],
        dense: Sequence[Mapping[Any, Any]] | None,
    ) -> ScoreRow:
        documents = _common(runs)
        values = [[run[key] for key in documents] for run in runs]
        found = None
        if dense is not None and (both := _common([*runs, *dense])):
            found = difference(
                how,
                [[run[key] for key in both] for run in dense],
                [[run[key] for key in both] for run in runs],
                confidence=self.confidence,
            )
        total = score(how, values, confidence=self.confidence)
        return ScoreRow(name, metric, mode.label, seed, len(documents), total, found)

    def _usage(self, name: str, members: list[str], mode: ModeSpec) -> UsageRow:
        cells = [cell for cell in self.cells if cell.task in members and cell.mode == mode.label]
        pooled = {phase: pool([cell.usage[phase] for cell in cells]) for phase in PHASES}
        tokens = {phase: usage.tokens for phase, usage in pooled.items()}
        total = sum(tokens.values())
        computed = sum(cell.layers_computed() * cell.tokens for cell in cells) / total if total else math.nan
        return UsageRow(
            task=name,
            mode=mode.label,
            alpha=mode.alpha,
            layers=cells[0].layers,
            tokens=tokens,
            active={phase: usage.usage(mode.alpha) for phase, usage in pooled.items()},
            computed=computed,
            seconds=sum(cell.seconds for cell in cells),
        )

    # ---- written down ----

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single documents, ready for ``json.dumps(allow_nan=False)``; NaN and inf are null."""
        return {
            "format": f"{FORMAT}.results",
            "version": VERSION,
            "configuration": self.configuration,
            "environment": self.environment,
            "confidence": self.confidence,
            "scores": [_finite(dataclasses.asdict(row)) for row in self.scores],
            "usage": [_finite(dataclasses.asdict(row)) for row in self.usage],
            "cells": [
                {
                    "task": cell.task,
                    "mode": cell.mode,
                    "seed": cell.seed,
                    "requests": cell.requests,
                    "seconds": cell.seconds,
                    "counters": cell.counters,
                    "usage": {name: dataclasses.asdict(phase) for name, phase in cell.usage.items()},
                }
                for cell in self.cells
            ],
        }

    def markdown(self) -> str:
        """Two tables a task, scores and layers, as docs/evaluate.md explains them."""
        from void_ext.evaluate.markdown import render

        return render(self)

    def plot(self, path: str | Path, force: bool = False) -> Path:
        """Score against layers computed, and usage per layer, per task: ``.png``, ``.svg`` or ``.pdf``."""
        from void_ext.evaluate.picture import plot_report

        return plot_report(self, path, force=force)

    def save(self, directory: str | Path, force: bool = False) -> dict[str, Path]:
        """Write ``results.json``, ``results.md`` and ``results.png``; each appears complete or not at all."""
        place = Path(directory)
        texts = {
            "results": (place / "results.json", json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"),
            "table": (place / "results.md", self.markdown()),
        }
        for path, text in texts.values():
            with replacing(path, what="directory", force=force) as temporary:
                temporary.write_text(text, encoding="utf-8")
        picture = self.plot(place / "results.png", force=force)
        return {name: path for name, (path, _) in texts.items()} | {"picture": picture}


def _values(
    cells: Mapping[tuple[str, str, int], Cell], members: Sequence[str], mode: str, seed: int, metric: str
) -> dict[Any, Any]:
    """Document -> value; documents without this metric are left out."""
    return {
        (name, item.doc_id): item.metrics[metric]
        for name in members
        if (name, mode, seed) in cells
        for item in cells[name, mode, seed].items
        if metric in item.metrics
    }


def _common(runs: Sequence[Mapping[Any, Any]]) -> list[Any]:
    """The documents that are in all runs."""
    return [key for key in runs[0] if all(key in run for run in runs)]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
