"""A tokenizer of characters, and small tasks of three kinds as files: choices, texts to be told, texts to write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHARACTERS = [chr(code) for code in range(32, 125)]  # 93, and three special tokens: the tiny models know 96


def build_tokenizer(chat: bool = False) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    if chat:
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    return tokenizer


@pytest.fixture
def tokenizer() -> Any:
    """One token a character. It has no pad token: giving one is the harness's affair."""
    return build_tokenizer()


def write_task_file(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> Path:
    """A task file and its documents, as a user would write them."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def write_task() -> Callable[..., Path]:
    """``write_task(folder, name, documents, **settings)``."""
    return write_task_file


WORDS = ["ape", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kite", "lion"]


def write_task_folder(folder: Path) -> Path:
    """``choices`` (12 questions of different lengths), ``telling`` (6 texts) and ``writing`` (8 prompts)."""
    choices = [
        {"question": f"{'very ' * (i % 4)}odd {word}:", "choices": [word, WORDS[i - 1], WORDS[i - 5]], "answer": i % 3}
        for i, word in enumerate(WORDS)
    ]
    write_task_file(
        folder,
        "choices",
        choices,
        output_type="multiple_choice",
        doc_to_text="question",
        doc_to_choice="choices",
        doc_to_target="answer",
        tag="small",
        metric_list=[{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    )
    texts = [{"text": " ".join(WORDS[i:] + WORDS[:i])[: 20 + 11 * i]} for i in range(6)]
    write_task_file(
        folder,
        "telling",
        texts,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        tag="small",
        metric_list=[
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    )
    prompts = [{"prompt": f"{word} and {WORDS[i - 3]}" + "!" * i, "target": word} for i, word in enumerate(WORDS[:8])]
    write_task_file(
        folder,
        "writing",
        prompts,
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="target",
        generation_kwargs={"until": ["Z"], "do_sample": False, "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    return folder


@pytest.fixture
def make_report() -> Callable[..., Any]:
    """``make_report({task: {mode: {seed: [metrics of a document, …]}}}, groups={task: group})``; modes dense and exit.

    Each document is ten tokens of the prompt, for which the only layer was active.
    """
    from void_ext.evaluate import Cell, Item, ModeSpec, Report
    from void_ext.evaluate.report import TaskInfo
    from void_ext.evaluate.statistics import Metric
    from void_ext.evaluate.tally import PhaseUsage

    class Means(dict[str, Metric]):
        def __missing__(self, metric: str) -> Metric:
            return Metric("mean")

    def make(answers: dict[str, Any], groups: dict[str, str] | None = None, metrics: Any = None) -> Report:
        cells = []
        for task, by_mode in answers.items():
            for mode, by_seed in by_mode.items():
                for seed, documents in by_seed.items():
                    tokens = 10 * len(documents)
                    items = [Item(index, dict(document), []) for index, document in enumerate(documents)]
                    usage = {
                        "prompt": PhaseUsage(tokens, {"0.8": [tokens]}, [tokens]),
                        "response": PhaseUsage(0, {"0.8": [0]}, [0]),
                    }
                    cells.append(Cell(task, mode, seed, items, usage, None, layers=1, requests=1, seconds=1.0))
        infos = {}
        for task, by_mode in answers.items():
            runs = next(iter(by_mode.values()))
            infos[task] = TaskInfo(
                name=task,
                group=(groups or {}).get(task),
                seeds=tuple(runs),
                documents=len(next(iter(runs.values()))),
                requests_sha256="",
                config={},
                generation={},
                metrics=Means(metrics or {}),
                higher_is_better={},
            )
        modes = [ModeSpec.dense(), ModeSpec.exit(0.8, label="exit")]
        return Report(
            cells=cells,
            tasks=infos,
            modes=[mode for mode in modes if any(mode.label in by_mode for by_mode in answers.values())],
            configuration={"model": {"name": "made", "dtype": "float32"}, "versions": {}},
            environment={"device": "none", "batch_size": 1, "processes": 1},
        )

    return make


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_folder(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def load(task_folder: Path) -> Callable[..., dict[str, Any]]:
    """``load("choices", "telling")``: fresh task objects."""

    def tasks(*names: str) -> dict[str, Any]:
        from void_ext.evaluate import load_tasks

        return load_tasks(names, [task_folder])

    return tasks
