"""What the protocol itself tells of its answers: unparsable ones, letters chosen, accuracy by the right one's place."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from void_ext._files import replacing
from void_ext.evaluate.cells import plain
from void_ext.evaluate.protocol import extraction
from void_ext.evaluate.protocol.items import LETTERS, Item

if TYPE_CHECKING:
    from void_ext.evaluate.cells import Cell
    from void_ext.evaluate.protocol.runs import Protocol

LIKELIHOOD = "likelihood"


@dataclass(frozen=True)
class Summary:
    """One task in one mode with one seed.

    Attributes:
        items: how many were asked.
        correct: answers that chose the right option; an unparsable one is wrong.
        unparsable: answers in which the extractor found none or several.
        asked: place of the right answer → items; every place is there, also with 0.
        correct_at: place of the right answer → how many of these were answered right.
        chosen: place → how often it was chosen.
        rules: rule of the extractor → how often it decided (``none`` and ``several``: unparsable).
    """

    task: str
    mode: str
    seed: int
    items: int
    correct: int
    unparsable: int
    asked: dict[str, int]
    correct_at: dict[str, int]
    chosen: dict[str, int]
    rules: dict[str, int]

    @property
    def accuracy(self) -> float:
        """Right answers of all."""
        return self.correct / self.items

    @property
    def accuracy_parsed(self) -> float:
        """Right answers of those that could be read; NaN where none could."""
        parsed = self.items - self.unparsable
        return self.correct / parsed if parsed else math.nan

    def accuracy_at(self, position: str) -> float:
        """Right answers of the items whose right answer stands at ``position``; NaN where there is none."""
        asked = self.asked[position]
        return self.correct_at[position] / asked if asked else math.nan

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "accuracy": self.accuracy,
            "unparsable_share": self.unparsable / self.items,
            "accuracy_parsed": None if math.isnan(self.accuracy_parsed) else self.accuracy_parsed,
        }


def summarize(protocol: Protocol, cells: Iterable[Cell]) -> list[Summary]:
    """One summary per cell, in the order of the cells."""
    return [_summary(cell, protocol.entries[cell.task].task.items) for cell in cells]


def answer_rows(protocol: Protocol, cells: Iterable[Cell]) -> Iterator[dict[str, Any]]:
    """Every answer and what was made of it: the item's key, never its question, so that the file can be shown."""
    for cell in cells:
        items = protocol.entries[cell.task].task.items
        for answered in cell.items:
            item = items[answered.doc_id]
            option, rule = _choice(item, answered.answers)
            yield {
                "task": cell.task,
                "mode": cell.mode,
                "seed": cell.seed,
                "item": item.key,
                "answer": answered.answers[0] if isinstance(answered.answers[0], str) else answered.answers,
                "rule": rule,
                "chosen": None if option is None else _places(item)[option],
                "right": item.position,
            }


def save_summary(
    protocol: Protocol, cells: Sequence[Cell], directory: str | Path, force: bool = False
) -> dict[str, Path]:
    """Write ``protocol.json``, ``protocol.md`` and ``answers.jsonl``; each appears complete or not at all."""
    place, summaries = Path(directory), summarize(protocol, cells)
    document = {**protocol.config, "summaries": [summary.to_dict() for summary in summaries]}
    texts = {
        "protocol": (place / "protocol.json", json.dumps(document, indent=1, allow_nan=False) + "\n"),
        "protocol table": (place / "protocol.md", render(summaries)),
        "answers": (
            place / "answers.jsonl",
            "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in answer_rows(protocol, cells)),
        ),
    }
    for path, text in texts.values():
        with replacing(path, what="directory", force=force) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return {name: path for name, (path, _) in texts.items()}


def _places(item: Item) -> Sequence[str]:
    return item.options if item.dataset == "boolq" else LETTERS


def _summary(cell: Cell, items: Sequence[Item]) -> Summary:
    places = _places(items[0])
    asked, correct_at, chosen, rules = (Counter[str]() for _ in range(4))
    unparsable = 0
    for answered in cell.items:
        item = items[answered.doc_id]
        option, rule = _choice(item, answered.answers)
        rules[rule] += 1
        asked[item.position] += 1
        if option is None:
            unparsable += 1
        else:
            chosen[places[option]] += 1
            correct_at[item.position] += option == item.answer
    return Summary(
        task=cell.task,
        mode=cell.mode,
        seed=cell.seed,
        items=len(cell.items),
        correct=sum(correct_at.values()),
        unparsable=unparsable,
        asked={place: asked[place] for place in places},
        correct_at={place: correct_at[place] for place in places},
        chosen={place: chosen[place] for place in places},
        rules=dict(sorted(rules.items())),
    )


def _choice(item: Item, answers: Sequence[Any]) -> tuple[int | None, str]:
    if isinstance(answers[0], str):
        found = extraction.extract(item, answers[0])
        return found.option, found.rule
    likelihoods = list(answers)
    option = likelihoods.index(max(likelihoods))
    # The harness's boolq asks for "no" and "yes", in this order.
    return (1 - option if item.dataset == "boolq" else option), LIKELIHOOD


def render(summaries: Sequence[Summary]) -> str:
    """A Markdown table: a row a task, mode and seed, and of several seeds one for their mean and spread."""
    lines = []
    for task in dict.fromkeys(summary.task for summary in summaries):
        group = [summary for summary in summaries if summary.task == task]
        places = list(group[0].asked)
        asked = ", ".join(f"{place} {group[0].asked[place]:,}" for place in places)
        lines += [f"**{task}**: {group[0].items:,} items, right answer at {asked}", ""]
        header = [
            "mode",
            "seed",
            "right",
            "unparsable",
            "right of parsed",
            *(f"right at {p}" for p in places),
            "chosen",
        ]
        lines += [_row(header), _row(["---"] * len(header))]
        for mode in dict.fromkeys(summary.mode for summary in group):
            runs = [summary for summary in group if summary.mode == mode]
            lines += [_row(_cells(run, places)) for run in runs]
            if len(runs) > 1:
                lines.append(_row(_mean(runs, places)))
        lines.append("")
    return "\n".join(lines)


def _cells(run: Summary, places: Sequence[str]) -> list[str]:
    chosen = " ".join(f"{place} {run.chosen[place]:,}" for place in places)
    shares = [run.accuracy, run.unparsable / run.items, run.accuracy_parsed, *map(run.accuracy_at, places)]
    return [run.mode, str(run.seed), *map(_percent, shares), chosen]


def _mean(runs: Sequence[Summary], places: Sequence[str]) -> list[str]:
    columns = [
        [run.accuracy for run in runs],
        [run.unparsable / run.items for run in runs],
        [run.accuracy_parsed for run in runs],
        *([run.accuracy_at(place) for run in runs] for place in places),
    ]
    return [runs[0].mode, f"mean ± sd of {len(runs)}", *map(_spread, columns), ""]


def _spread(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return "–"
    return f"{_percent(statistics.fmean(values))} ± {100 * statistics.stdev(values):.1f}"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
