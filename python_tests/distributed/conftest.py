"""Two processes on this machine, joined by gloo, run a script; what they found is read from their files."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_RANKS = 2
_HERE = Path(__file__).parent
_PATIENCE = 240  # seconds: ranks that wait for each other for ever are a failure, not a hang of the tests


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def work() -> ModuleType:
    """The module that the ranks import too."""
    return _module(_HERE / "work.py")


@pytest.fixture(scope="session")
def evaluation() -> ModuleType:
    """The module that the ranks of an evaluation import too."""
    pytest.importorskip("lm_eval")
    return _module(_HERE / "evaluation.py")


@pytest.fixture(scope="session")
def of_evaluate() -> ModuleType:
    """What makes the tokenizer and the tasks of the tests of evaluation."""
    return _module(_HERE.parent / "evaluate" / "conftest.py")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory, of_evaluate: Any) -> Path:
    """The tasks of the tests of evaluation, and ``letters``: choices that differ in their last token alone."""
    path: Path = of_evaluate.write_task_folder(tmp_path_factory.mktemp("tasks"))
    letters = [{"question": word, "choices": list("abc"), "answer": len(word) % 3} for word in of_evaluate.WORDS[:7]]
    of_evaluate.write_task_file(
        path,
        "letters",
        letters,
        output_type="multiple_choice",
        doc_to_text="question",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    return path


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory, tiny: Any, of_evaluate: Any) -> Path:
    """A model and a tokenizer of characters."""
    path: Path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    of_evaluate.build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def start(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """``start("rank.py", …)``: what each rank found, by the names in that file; ``…`` are arguments after its own."""

    def run(script: str, *arguments: object) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp("ranks")
        shared = {"WORLD_SIZE": _RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "OMP_NUM_THREADS": 1}
        processes = [
            subprocess.Popen(
                [sys.executable, _HERE / script, model_directory, out / f"{rank}.json", *map(str, arguments)],
                env={**os.environ, **{k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(_RANKS)
        ]
        try:
            said = [process.communicate(timeout=_PATIENCE)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{said[rank][-4000:]}"
        return [json.loads((out / f"{rank}.json").read_text()) for rank in range(_RANKS)]

    return run


@pytest.fixture(scope="module")
def ranks(start: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each rank of ``rank.py`` found."""
    return start("rank.py")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
