"""Two processes on this machine, joined by gloo, run ``rank.py``; what they found is read from their files."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_RANKS = 2
_PATIENCE = 240  # seconds: ranks that wait for each other for ever are a failure, not a hang of the tests


@pytest.fixture(scope="session")
def work() -> ModuleType:
    """The module that the ranks import too."""
    spec = importlib.util.spec_from_file_location("work", Path(__file__).with_name("work.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ranks(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by the names in ``rank.py``."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": _RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    script = Path(__file__).with_name("rank.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(model_directory), str(out / f"{rank}.json")],
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
