"""From a protocol's name to what ``void_ext.evaluate.run`` takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from void_ext.evaluate.protocol import extraction
from void_ext.evaluate.protocol.datasets import DATASETS
from void_ext.evaluate.protocol.presets import PROTOCOLS, SEEDS
from void_ext.evaluate.protocol.sources import Loaded, load_items
from void_ext.models._common import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from void_ext.evaluate.protocol.tasks import ItemTask
    from void_ext.evaluate.settings import TaskRun


@dataclass(frozen=True)
class Protocol:
    """What a protocol asks.

    Attributes:
        name: ``"paper"`` or ``"likelihood"``.
        tasks: by the name of the data set.
        entries: name in the report → the run of a task: ``"mmlu_sampled"`` and ``"mmlu_greedy"``, or ``"mmlu"``.
        loaded: where the items came from.
        config: what identifies all this, in JSON.
    """

    name: str
    tasks: Mapping[str, ItemTask]
    entries: Mapping[str, TaskRun]
    loaded: tuple[Loaded, ...]
    config: Mapping[str, Any]

    @property
    def needs_chat_template(self) -> bool:
        return self.name == "paper"

    @property
    def notes(self) -> list[str]:
        """What a reader of the results has to know of the data."""
        return [note for loaded in self.loaded for note in loaded.notes]


def build_protocol(
    name: str,
    *,
    datasets: Sequence[str] = tuple(DATASETS),
    data_dir: str | os.PathLike[str] | None = None,
    order: str = "hash",
    seeds: Sequence[int] = SEEDS,
    drop_duplicates: bool = False,
    progress: Progress = silent,
) -> Protocol:
    """The tasks of a protocol over its data.

    Args:
        name: ``"paper"``: text is generated in the paper's layout and chat template, once greedily and once for each
            of ``seeds`` at temperature 0.6 and top-p 0.9, 50 tokens. ``"likelihood"``: the standard tasks of
            lm-evaluation-harness (mmlu, gpqa_diamond_zeroshot, boolq), once.
        datasets: of ``"mmlu"``, ``"gpqa_diamond"``, ``"boolq"``.
        data_dir: see :func:`~void_ext.evaluate.protocol.sources.local_files`.
        order: of GPQA's options, ``"hash"`` or ``"paper"``.
        seeds: of the sampled runs; none: greedy alone.
        drop_duplicates: leave copies of an item out.

    Raises:
        ValueError, DataError: as :func:`~void_ext.evaluate.protocol.sources.load_items`.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    unknown = [dataset for dataset in datasets if dataset not in DATASETS]
    if unknown or not datasets or len(set(datasets)) < len(datasets):
        got = ", ".join(datasets) or "none"
        raise ValueError(f"data sets: expected some of {', '.join(DATASETS)}, each once, got {got}")
    loaded = tuple(
        load_items(dataset, data_dir=data_dir, order=order, drop_duplicates=drop_duplicates, progress=progress)
        for dataset in datasets
    )
    from void_ext.evaluate.protocol.tasks import PaperTask, likelihood_task

    tasks: dict[str, ItemTask] = {}
    for found in loaded:
        dataset = found.data.name
        tasks[dataset] = (
            PaperTask(f"paper_{dataset}", found.items) if name == "paper" else likelihood_task(dataset, found.items)
        )
    entries: dict[str, TaskRun] = {}
    for dataset, task in tasks.items():
        entries |= _paper_runs(dataset, task, seeds) if name == "paper" else _likelihood_run(dataset, task)
    config = {
        "protocol": name,
        "order": order,
        "drop_duplicates": drop_duplicates,
        "extractor": extraction.VERSION,
        "data": {
            found.data.name: {
                "hub_id": found.data.hub_id,
                "items": len(found.items),
                "files": [path.name for path in found.files],
                "sha256": found.sha256,
                "notes": list(found.notes),
            }
            for found in loaded
        },
    }
    return Protocol(name, tasks, entries, loaded, config)


def check_tokenizer(protocol: Protocol, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """ValueError where the protocol needs a chat template that the tokenizer has not."""
    if protocol.needs_chat_template and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"--protocol {protocol.name}: the tokenizer of {model!r} has no chat template, and every question of this "
            "protocol goes into one. Take the instruction-tuned version of the model (its name often ends in -Instruct "
            "or -chat), put a chat_template.jinja beside its tokenizer, or use --protocol likelihood, which needs none"
        )


def long_prompts(protocol: Protocol, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> list[str]:
    """A note for each data set with prompts that do not fit with 50 new tokens: the harness cuts them on the left."""
    if protocol.name != "paper" or positions is None:
        return []
    from void_ext.evaluate.protocol.prompts import paper_prompt
    from void_ext.evaluate.protocol.tasks import MAX_NEW_TOKENS

    notes = []
    for found in protocol.loaded:
        room = positions - MAX_NEW_TOKENS
        # A token is at least a character, so short texts need not be counted.
        texts = [text for text in map(paper_prompt, found.items) if len(text.encode()) > room // 2]
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
        long = sum(len(ids) > room for ids in tokenizer(chats, add_special_tokens=False)["input_ids"]) if chats else 0
        if long:
            notes.append(
                f"{found.data.name}: {long:,} of {len(found.items):,} prompts are longer than the {positions:,} "
                f"positions of this model less {MAX_NEW_TOKENS}; they lose their beginning"
            )
    return notes


def _paper_runs(dataset: str, task: ItemTask, seeds: Sequence[int]) -> dict[str, TaskRun]:
    from void_ext.evaluate.protocol.tasks import GREEDY, SAMPLED
    from void_ext.evaluate.settings import TaskRun

    sampled = {f"{dataset}_sampled": TaskRun(task, generation=SAMPLED, seeds=tuple(seeds))} if seeds else {}
    return {f"{dataset}_greedy": TaskRun(task, generation=GREEDY, seeds=(0,)), **sampled}


def _likelihood_run(dataset: str, task: ItemTask) -> dict[str, TaskRun]:
    from void_ext.evaluate.settings import TaskRun

    return {str(task.config.task): TaskRun(task, seeds=(0,))}
