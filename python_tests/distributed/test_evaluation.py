"""Processes that share an evaluation find what one process finds, and end together where one of them fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from void_ext import cli, models
from void_ext.evaluate import ModeSpec, Settings, load_tasks, run

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

PEER = "PeerError: process {} of the 2 that share this evaluation failed: "


@pytest.fixture(scope="module")
def shared(start: Callable[..., list[dict[str, Any]]], task_folder: Path) -> list[dict[str, Any]]:
    """What each process of ``evaluation_rank.py`` found."""
    return start("evaluation_rank.py", task_folder)


@pytest.fixture(scope="module")
def loaded(model_directory: Path) -> tuple[Any, Any]:
    return models.load(model_directory, device="cpu")


def alone(loaded: tuple[Any, Any], task_folder: Path, evaluation: Any, **settings: Any) -> dict[str, Any]:
    """The answers written to ``writing`` by the dense model."""
    tasks = load_tasks(["writing"], [task_folder])
    content: dict[str, Any] = evaluation.content(run(*loaded, tasks, [ModeSpec.dense()], Settings(**settings)))
    return content


def test_a_shared_run_is_that_of_one_process(
    shared: list[dict[str, Any]], loaded: tuple[Any, Any], task_folder: Path, evaluation: Any
) -> None:
    """Items, scores, usage and counters, bit for bit: processes share the batches that one process makes."""
    report = evaluation.report_of(*loaded, task_folder)
    expected = evaluation.content(report)
    assert len({json.dumps(row) for row in expected["items"]}) > len(expected["items"]) // 2
    for found in shared:
        assert found["processes"] == 2
        for key, value in expected.items():
            assert found["shared"][key] == value, key
        assert found["with examples"] == evaluation.content(evaluation.with_examples(*loaded, task_folder))
        assert len(found["seconds"]) == len(report.cells)
        assert min(found["seconds"]) > 0
    assert shared[0]["seconds"] == shared[1]["seconds"]


def test_fewer_batches_than_processes(
    shared: list[dict[str, Any]], loaded: tuple[Any, Any], task_folder: Path, evaluation: Any
) -> None:
    expected = alone(loaded, task_folder, evaluation, batch_size=64)
    assert [found["of one batch"] for found in shared] == [expected] * 2


def test_share_can_be_declined(
    shared: list[dict[str, Any]], loaded: tuple[Any, Any], task_folder: Path, evaluation: Any
) -> None:
    for rank, found in enumerate(shared):
        assert found["alone"] == alone(loaded, task_folder, evaluation, limit=2 + rank)


def test_a_tensor_parallel_model_is_not_shared(
    shared: list[dict[str, Any]], loaded: tuple[Any, Any], task_folder: Path, evaluation: Any
) -> None:
    expected = alone(loaded, task_folder, evaluation, batch_size=3)
    for found in shared:
        assert found["tensor parallel"]["items"] == expected["items"]
        assert found["tensor parallel"]["cells"] == expected["cells"]


@pytest.mark.parametrize(
    ("case", "failing", "message"),
    [
        ("a plan that does not fit", 1, "ValueError: model: the plan was made for 12 layers, got 6"),
        ("no place to write", 0, "PermissionError: directory: the directory '/proc' of '/proc/void-eval'"),
        ("another run's place", 0, "ValueError: directory: "),
        ("a place in use", 0, "ValueError: directory: expected one that no other run is using"),
        ("a call that fails", 1, "ArithmeticError: no"),
        ("a score that fails", 1, "ArithmeticError: no score"),
        ("a full disk", 0, "OSError: [Errno 28] No space left on device"),
    ],
)
def test_an_error_in_one_process_is_one_in_all(
    case: str, failing: int, message: str, shared: list[dict[str, Any]]
) -> None:
    assert shared[failing]["errors"][case].startswith(message)
    assert shared[1 - failing]["errors"][case].startswith(PEER.format(failing) + message)


def test_sharded_weights_are_refused(shared: list[dict[str, Any]]) -> None:
    message = "UnsupportedModelError: model: cannot be evaluated with weights sharded by FSDP (FSDPLlamaForCausalLM); "
    assert all(found["errors"]["sharded"].startswith(message) for found in shared)


def test_processes_that_differ_are_refused(shared: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(shared):
        said = found["errors"]["other settings"]
        assert said.startswith("ValueError: share: expected the same model, tasks, modes and settings in all 2 proc")
        assert f"process {1 - rank} and this one, {rank}, differ" in said
        assert f"settings.limit: {3 - rank} there, {2 + rank} here" in said


def test_a_process_that_is_interrupted_is_noticed(shared: list[dict[str, Any]]) -> None:
    assert shared[1]["errors"]["an interrupt"] == "KeyboardInterrupt: stop"
    ended = "PeerError: another of the 2 processes that share this evaluation has ended"
    assert shared[0]["errors"]["an interrupt"] == ended


def test_afterwards_they_share_again(
    shared: list[dict[str, Any]], loaded: tuple[Any, Any], task_folder: Path, evaluation: Any
) -> None:
    for found in shared:
        assert found["after all of that"] == alone(loaded, task_folder, evaluation, batch_size=3)
    assert shared[0]["said"] > 0
    assert shared[1]["said"] == 0  # progress


def test_the_command_says_an_error_once(shared: list[dict[str, Any]]) -> None:
    first, second = (found["cli errors"] for found in shared)
    assert {name: code for name, (code, _) in (first | second).items()} == dict.fromkeys(first, 1)
    assert "holds a run of another configuration" in first["another run's place"][1]
    missing = "process 1 of the 2 that share this evaluation failed: FileNotFoundError: --plan: no plan file at"
    assert missing in first["a plan that is missing"][1]
    assert second["another run's place"][1] == second["a plan that is missing"][1] == ""
    for found in (first, second):
        assert "2 processes share the work and each takes a device of its own, got 'cuda:1'" in (
            found["one device for all"][1].replace("\n", " ")
        )
    assert not shared[0]["left behind"]


def test_usage_is_pooled_under_accelerate(shared: list[dict[str, Any]], loaded: tuple[Any, Any], work: Any) -> None:
    expected = work.usage(loaded[0], work.batches())
    for found in shared:
        assert found["usage"]["tokens"] == expected.tokens == 36
        assert found["usage"]["active"] == expected.active.tolist()
        assert found["usage"]["usage"] == expected.usage().tolist()


def test_accelerate_launch_goes_on_where_one_process_stopped(
    model_directory: Path,
    task_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command itself, and after it one process once more."""
    argv = ["eval", str(model_directory), "--tasks", "choices,writing", "--task-path", str(task_folder)]
    argv += ["--modes", "dense,skip", "--skip", "2", "--batch-size", "3", "--json"]
    assert cli.main([*argv, "--device", "cpu", "--out", str(tmp_path / "whole")]) == 0
    expected = json.loads(capsys.readouterr().out)

    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    for path in out.iterdir():
        if path.name.startswith("results."):
            path.unlink()
    cells = sorted((out / "cells").iterdir())
    kept = {path: path.read_bytes() for path in cells[:1]}
    for path in cells[1:]:
        path.unlink()
    # Asked for CPUs, accelerate starts several processes with MPI alone. These look for a GPU and find none.
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += " --dynamo_backend no --main_process_port 0 -m void_ext.cli"
    result = subprocess.run(
        [sys.executable, *launch.split(), *argv, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout)  # of the first process alone
    assert result.stderr.count("building the requests") == 1
    assert found["environment"]["processes"] == 2
    assert expected["environment"]["processes"] == 1
    assert (out / "results.png").is_file()
    for document in (expected, found):
        del document["environment"], document["files"]
        for row in (*document["usage"], *document["cells"]):
            del row["seconds"]
    assert found == expected
    assert {path: path.read_bytes() for path in kept} == kept
    for path in (tmp_path / "whole" / "cells").iterdir():
        one, two = json.loads(path.read_text()), json.loads((out / "cells" / path.name).read_text())
        assert one | {"seconds": 0} == two | {"seconds": 0}

    monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda *_, **__: pytest.fail("ran again"))
    assert cli.main([*argv, "--device", "cpu", "--out", str(out)]) == 0
