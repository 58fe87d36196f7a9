"""The protocols as tasks of lm-evaluation-harness, over rows that are here already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from void_ext.evaluate.protocol import extraction
from void_ext.evaluate.protocol.items import LETTERS, Item
from void_ext.evaluate.protocol.prompts import paper_prompt
from void_ext.evaluate.protocol.sampling import PER_ITEM

MAX_NEW_TOKENS, TEMPERATURE, TOP_P = 50, 0.6, 0.9
# What a checkpoint's generation_config.json would add, such as a repetition penalty, is not in the paper's code, so it
# is switched off by name. No stop text: an end-of-text token ends an answer, or its length.
_GENERATION = {"until": [], "max_gen_toks": MAX_NEW_TOKENS, "repetition_penalty": 1.0}
GREEDY: dict[str, Any] = {**_GENERATION, "do_sample": False, "temperature": 0.0}
SAMPLED: dict[str, Any] = {
    **_GENERATION, "do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0, PER_ITEM: True
}  # fmt: skip

POSITION = "acc_at_"


class ItemTask(ConfigurableTask):  # type: ignore[misc]
    """A zero-shot task over items that are in memory; also scores by where the right answer stands."""

    def __init__(self, items: Sequence[Item], rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]):
        self.items = tuple(items)
        self._rows = [dict(row) for row in rows]
        super().__init__(config={**config, "test_split": "test", "num_fewshot": 0})

    def download(self, dataset_kwargs: Any = None, **_: Any) -> None:
        self.dataset = {"test": Dataset.from_list(self._rows)}

    def aggregation(self) -> dict[str, Any]:
        return {**super().aggregation(), **dict.fromkeys(self._positions(), mean)}

    def higher_is_better(self) -> dict[str, bool]:
        return {**super().higher_is_better(), **dict.fromkeys(self._positions(), True)}

    def _positions(self) -> list[str]:
        return [POSITION + position for position in positions(self.items)]


class PaperTask(ItemTask):
    """One data set in the paper's layout: text is generated, :mod:`void_ext.evaluate.protocol.extraction` reads it.

    Per document: ``acc`` (an unparsable answer is wrong), ``unparsable``, and ``acc_at_A`` … ``acc_at_D`` (BoolQ:
    ``acc_at_True``, ``acc_at_False``), of which a document has the one where its right answer stands.
    """

    def __init__(self, name: str, items: Sequence[Item]):
        config = {
            "task": name,
            "output_type": "generate_until",
            # Methods do the work; these lines are what a reader of the configuration learns of them.
            "doc_to_text": "void_ext.evaluate.protocol.prompts.paper_prompt",
            "doc_to_target": "void_ext.evaluate.protocol.items.Item.position",
            "process_results": f"void_ext.evaluate.protocol.extraction, version {extraction.VERSION}",
            "generation_kwargs": dict(GREEDY),
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "unparsable", "aggregation": "mean", "higher_is_better": False},
            ],
            "metadata": {"version": 1.0},
        }
        super().__init__(items, [{**asdict(item), "options": list(item.options)} for item in items], config)

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: Any = None) -> str:
        return paper_prompt(_item(doc))

    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: Any = None) -> str:
        return _item(doc).position

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        item = _item(doc)
        found = extraction.extract(item, results[0]).option
        correct = float(found == item.answer)
        return {"acc": correct, "unparsable": float(found is None), POSITION + item.position: correct}


class LikelihoodTask(ItemTask):
    """A standard task of the harness, its prompt and scoring as installed, over rows from here."""

    def process_results(self, doc: Mapping[str, Any], results: Any) -> dict[str, float]:
        scores: dict[str, float] = super().process_results(doc, results)
        return {**scores, POSITION + doc["position"]: scores["acc"]}


def likelihood_task(dataset: str, items: Sequence[Item]) -> LikelihoodTask:
    """The harness's ``mmlu`` (its 57 tasks as one), ``gpqa_diamond_zeroshot`` or ``boolq``."""
    name, path, row = _LIKELIHOOD[dataset]
    import lm_eval

    config = _read_config(Path(lm_eval.__file__).parent / "tasks" / path)
    wanted = {key: config[key] for key in _KEPT if key in config}
    # What the harness takes where a file leaves it out, said so that it does not warn.
    wanted["metric_list"] = [
        {"aggregation": "mean", "higher_is_better": True, **metric} for metric in wanted["metric_list"]
    ]
    if dataset == "mmlu":
        # The 57 files differ in nothing but the subject that the description names.
        wanted["description"] = _MMLU_DESCRIPTION
    rows = [{**row(item), "position": item.position} for item in items]
    return LikelihoodTask(items, rows, {**wanted, "task": name})


def positions(items: Sequence[Item]) -> list[str]:
    """Where right answers can stand: ``["A", …]`` or ``["True", "False"]``."""
    return list(items[0].options) if items[0].dataset == "boolq" else list(LETTERS[: len(items[0].options)])


def _item(doc: Mapping[str, Any]) -> Item:
    return Item(**{**doc, "options": tuple(doc["options"])})


# ---- the harness's own prompts ----

_MMLU_DESCRIPTION = (
    "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\n\n"
)
_KEPT = (
    "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "description", "metric_list", "metadata",
    "target_delimiter",
)  # fmt: skip


def _mmlu_row(item: Item) -> dict[str, Any]:
    return {"question": item.question, "choices": list(item.options), "answer": item.answer, "subject": item.subject}


def _gpqa_row(item: Item) -> dict[str, Any]:
    # As the harness's process_docs cleans options; it shuffles them by a global seed, which is left out.
    shown = [text.strip().replace(" [title]", ". ").replace("  ", " ") for text in item.options]
    choices = {f"choice{number}": text for number, text in enumerate(shown, 1)}
    return {"Question": item.question, **choices, "answer": f"({LETTERS[item.answer]})"}


def _boolq_row(item: Item) -> dict[str, Any]:
    return {"question": item.question, "passage": item.passage, "label": 1 - item.answer}


_LIKELIHOOD = {
    "mmlu": ("mmlu", "mmlu/default/_default_template_yaml", _mmlu_row),
    "gpqa_diamond": ("gpqa_diamond_zeroshot", "gpqa/zeroshot/_gpqa_zeroshot_yaml", _gpqa_row),
    "boolq": ("boolq", "super_glue/boolq/default.yaml", _boolq_row),
}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without code: a ``!function`` stays a text."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError:
        import lm_eval

        raise ValueError(
            f"lm-eval {lm_eval.__version__} has no {path}; 0.4.13 does (pip install lm-eval==0.4.13)"
        ) from None
    return dict(config)
