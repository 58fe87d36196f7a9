"""The three data sets of the paper: where they are published, their columns, and what a row of each means."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from void_ext.evaluate.protocol.items import LETTERS, Item, content_key
from void_ext.evaluate.protocol.reading import Row
from void_ext.evaluate.protocol.shuffle import hashed_order

ORDERS = ("hash", "paper")


@dataclass(frozen=True)
class DataSet:
    """A published data set.

    Attributes:
        name: how it is called here and in the names of local files.
        hub_id: its id on the Hugging Face hub.
        hub_file: the file of the split that is asked.
        split: the split's name.
        columns: what has to be there.
        size: rows of that split as published.
        item: makes an :class:`Item` of a row; ``ValueError`` says what is wrong with a column.
        note: what else one has to know to get it.
    """

    name: str
    hub_id: str
    hub_file: str
    split: str
    columns: tuple[str, ...]
    size: int
    item: Callable[[Row, str], Item]
    note: str = ""


def mmlu_item(row: Row, order: str = "hash") -> Item:
    """MMLU: its own order of options, under either ``order``, as its right answers are spread over A to D already."""
    question, options = _text(row, "question"), _choices(row)
    index, subject = _option(row["answer"]), _text(row, "subject")
    return Item("mmlu", content_key("mmlu", subject, question, *options), question, options, index, subject=subject)


def gpqa_item(row: Row, order: str = "hash") -> Item:
    """GPQA: ``"hash"`` shuffles the options by the item's content, ``"paper"`` puts the right one last, always D."""
    question = _text(row, "Question")
    wrong = [_text(row, f"Incorrect Answer {number}") for number in (1, 2, 3)]
    texts = (*wrong, _text(row, "Correct Answer"))
    key = content_key("gpqa_diamond", question, *texts)
    shown = hashed_order(key, len(texts)) if order == "hash" else tuple(range(len(texts)))
    return Item("gpqa_diamond", key, question, tuple(texts[index] for index in shown), shown.index(3))


def boolq_item(row: Row, order: str = "hash") -> Item:
    """BoolQ: nothing to order; ``answer`` is a truth value."""
    question, passage, value = _text(row, "question"), _text(row, "passage"), row["answer"]
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        value = value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"column answer: expected true or false, got {_shown(value)}")
    options = ("True", "False")
    return Item("boolq", content_key("boolq", question, passage), question, options, int(not value), passage=passage)


DATASETS = {
    data.name: data
    for data in (
        DataSet(
            name="mmlu",
            hub_id="cais/mmlu",
            hub_file="all/test-00000-of-00001.parquet",
            split="test",
            columns=("question", "subject", "choices", "answer"),
            size=14042,
            item=mmlu_item,
        ),
        DataSet(
            name="gpqa_diamond",
            hub_id="Idavidrein/gpqa",
            hub_file="gpqa_diamond.csv",
            split="train",
            columns=("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            size=198,
            item=gpqa_item,
            note="It is gated: accept its terms on its hub page and log in (hf auth login), or take dataset.zip from "
            "github.com/idavidrein/gpqa and unpack it with the password that stands in the README there.",
        ),
        DataSet(
            name="boolq",
            hub_id="google/boolq",
            hub_file="data/validation-00000-of-00001.parquet",
            split="validation",
            columns=("question", "passage", "answer"),
            size=3270,
            item=boolq_item,
        ),
    )
}


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column}: expected a text, got {_shown(value)}")
    return value


def _choices(row: Row) -> tuple[str, ...]:
    value: Any = row["choices"]
    if isinstance(value, str):  # csv has no lists
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(
                'column choices: expected a JSON array in a csv field, such as ["red", "blue", "green", "grey"], got '
                f"{_shown(value)}; the parquet or jsonl file keeps lists as they are"
            ) from None
    if not isinstance(value, list) or len(value) != len(LETTERS) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"column choices: expected {len(LETTERS)} texts, got {_shown(value)}")
    return tuple(value)


def _option(value: Any) -> int:
    """0 to 3 or A to D → the index."""
    text = str(value).strip()
    if not isinstance(value, bool):
        if text in LETTERS and len(text) == 1:
            return LETTERS.index(text)
        if text in {str(index) for index in range(len(LETTERS))}:
            return int(text)
    raise ValueError(f"column answer: expected 0 to 3 or A to D, which option is right, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
