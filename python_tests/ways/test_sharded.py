"""FSDP (both kinds), DistributedDataParallel, DataParallel: traced with the values of the whole model, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import void_ext

PROGRAM = Path(__file__).with_name("sharded.py")


@pytest.mark.parametrize("processes", [1, 2])
def test_sharded_and_replicated(processes: int, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    command = [sys.executable, str(PROGRAM)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(processes), str(tmp_path / "meeting")],
            **{"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        )
        for rank in range(processes)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text
        assert text.rstrip().endswith("done")


@torch.no_grad()
def test_data_parallel(tiny: Any, padded_batch: Any) -> None:
    """On one device it hands on to the model; on several it makes copies, which would record nothing."""
    model, ids = tiny("llama"), padded_batch[0]
    parallel = torch.nn.DataParallel(model)
    with void_ext.patch(parallel) as handle:
        parallel(input_ids=ids)
    assert handle.trace is not None
    parallel.device_ids = [0, 1]
    with pytest.raises(void_ext.UnsupportedModelError, match=r"nn\.DataParallel copies it to 2 devices"):
        void_ext.patch(parallel)
    assert "forward" not in model.model.layers[0].__dict__


@torch.no_grad()
def test_sharded_after_the_first_call(tiny: Any, padded_batch: Any) -> None:
    """A stand-in for fully_shard, which gives a module another class: refused at the next prompt."""
    model, ids = tiny("llama"), padded_batch[0]
    layer = model.model.layers[1]
    with void_ext.patch(model, mode="skip", plan=void_ext.VoidPlan.from_layers(model, skip=[2])):
        model(ids)
        layer.__class__ = type("FSDPLlamaDecoderLayer", (type("FSDPModule", (), {}), type(layer)), {})
        with pytest.raises(void_ext.UnsupportedModelError, match="sharded by FSDP"):
            model(ids)
