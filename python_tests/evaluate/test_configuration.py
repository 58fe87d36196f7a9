"""What tells two runs apart, so that finished work of one is not taken for the other's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from void_ext.evaluate import ModeSpec, TaskRun, load_tasks, run

pytest.importorskip("lm_eval")

WORDS = ["ape", "bee", "cat", "dog"]


def test_weights_of_another_model_are_another_configuration(
    tmp_path: Path, tiny: Any, tokenizer: Any, load: Callable[..., Any]
) -> None:
    """Another initialisation has the same norms, and so has a checkpoint with an adapter merged into it."""
    place, modes = tmp_path / "out", [ModeSpec.dense()]
    run(tiny("llama"), tokenizer, load("telling"), modes, directory=place)
    run(tiny("llama"), tokenizer, load("telling"), modes, directory=place)
    with pytest.raises(ValueError, match=r"\(model.content_sha256: \S+ there, \S+ here\)"):
        run(tiny("llama", seed=1), tokenizer, load("telling"), modes, directory=place)
    merged = tiny("llama")
    merged.model.layers[2].mlp.up_proj.weight.data *= 1.01
    with pytest.raises(ValueError, match=r"model.content_sha256"):
        run(merged, tokenizer, load("telling"), modes, directory=place)


def test_a_mended_answer_key_is_another_configuration(
    tmp_path: Path, tiny: Any, tokenizer: Any, write_task: Callable[..., Path]
) -> None:
    """The requests stay the same, and so would the old scores."""
    documents = [{"question": word, "choices": ["a", "b"], "answer": 0, "notes": ""} for word in WORDS]

    def tasks(**settings: Any) -> dict[str, TaskRun]:
        path = write_task(
            tmp_path, "keyed", documents, output_type="multiple_choice", doc_to_text="question",
            doc_to_choice="choices", **{"doc_to_target": "answer", **settings},
        )  # fmt: skip
        return load_tasks(["keyed"], [path])

    place, modes = tmp_path / "out", [ModeSpec.dense()]
    run(tiny("llama"), tokenizer, tasks(), modes, directory=place)
    run(tiny("llama"), tokenizer, tasks(), modes, directory=place)
    for name, value in (("answer", 1), ("notes", "checked")):
        before, documents[2][name] = documents[2][name], value
        with pytest.raises(ValueError, match=r"tasks\.keyed\.requests_sha256"):
            run(tiny("llama"), tokenizer, tasks(), modes, directory=place)
        documents[2][name] = before


def test_where_an_object_lies_in_memory_is_no_difference(load: Callable[..., Any]) -> None:
    """Documents may hold pictures and the like, whose text is their address."""
    from void_ext.evaluate.configuration import requests_digest

    task = load("choices")["choices"].task
    task.build_all_requests(rank=0, world_size=1)
    digests = []
    for thing in (object(), object(), "another"):
        for instance in task.instances:
            instance.doc = {**instance.doc, "thing": thing}
        digests.append(requests_digest(task))
    assert digests[0] == digests[1] != digests[2]
