"""One of the processes: ``evaluation_rank.py MODEL_DIRECTORY RESULT.json TASK_DIRECTORY``, in torchrun's variables."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluation
import rank
import torch
import work
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import void_ext
from void_ext import cli, models
from void_ext.evaluate import CellStore, ModeSpec, Settings, load_tasks, run

RANK = int(os.environ["RANK"])


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def raising(error: BaseException, calls: int) -> Callable[..., None]:
    """A hook that raises at its ``calls``-th call, in the second process."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if RANK == 1 and count == calls:
            raise error

    return hook


def main(path: str, result: str, task_folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    folder, out = Path(task_folder), Path(result).parent
    model, tokenizer = models.load(path, device="cpu")
    one_task = load_tasks(["writing"], [folder])
    dense = [ModeSpec.dense()]
    said: list[str] = []

    def small(**options: Any) -> Any:
        settings = options.pop("settings", Settings(batch_size=3))
        given = options.pop("modes", dense)
        return run(model, tokenizer, one_task, given, settings, progress=lambda what, *_: said.append(what), **options)

    found: dict[str, Any] = {}
    count = work.usage(model, work.batches()[RANK::2]).gather()
    found["usage"] = {"active": count.active.tolist(), "tokens": count.tokens, "usage": count.usage().tolist()}

    report = evaluation.report_of(model, tokenizer, folder, directory=out / "run")
    found["shared"] = evaluation.content(report)
    found["processes"] = report.environment["processes"]
    found["seconds"] = [cell.seconds for cell in report.cells]
    found["with examples"] = evaluation.content(evaluation.with_examples(model, tokenizer, folder))
    found["of one batch"] = evaluation.content(small(settings=Settings(batch_size=64)))

    # What one process may do while the other does something else.
    found["alone"] = evaluation.content(small(settings=Settings(limit=2 + RANK), share=False))

    errors: dict[str, str] = {}
    errors["other settings"] = error_of(lambda: small(settings=Settings(limit=2 + RANK)))
    errors["a plan that does not fit"] = error_of(lambda: small(modes=evaluation.modes(6 + 6 * RANK)))
    errors["no place to write"] = error_of(lambda: small(directory="/proc/void-eval"))
    errors["another run's place"] = error_of(lambda: small(directory=out / "run"))
    with CellStore(out / "run") if RANK == 0 else contextlib.nullcontext():
        errors["a place in use"] = error_of(lambda: small(directory=out / "run"))
    with model.lm_head.register_forward_pre_hook(raising(ArithmeticError("no"), 2)):
        errors["a call that fails"] = error_of(small)
    task = one_task["writing"].task
    scored = task.process_results
    task.process_results = raising(ArithmeticError("no score"), 1) if RANK == 1 else scored
    errors["a score that fails"] = error_of(small)
    task.process_results = scored
    store = CellStore(out / "full")
    if RANK == 0:
        store.add = raising_full  # type: ignore[method-assign]
    errors["a full disk"] = error_of(lambda: small(directory=store))
    said.clear()
    found["after all of that"] = evaluation.content(small())
    found["said"] = len(said)

    cli_errors = {}
    plans = out / f"plan{RANK}.json"
    if RANK == 0:
        void_ext.VoidPlan.from_layers(model, skip=[2]).save(plans)
    argv = ["eval", path, "--task-path", task_folder, "--batch-size", "3", "--tasks", "writing"]
    for name, options in {
        "another run's place": ["--out", str(out / "run")],
        "a plan that is missing": ["--out", str(out / "new"), "--modes", "dense,skip", "--plan", str(plans)],
        "one device for all": ["--out", str(out / "new"), "--device", "cuda:1"],
    }.items():
        with contextlib.redirect_stderr(io.StringIO()) as text:
            cli_errors[name] = cli.main([*argv, *options]), text.getvalue()
    found["cli errors"] = cli_errors
    found["left behind"] = (out / "new").exists()

    parallel = rank.parallel(path)
    found["tensor parallel"] = evaluation.content(run(parallel, tokenizer, one_task, dense, Settings(batch_size=3)))
    sharded = fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (2,)))
    errors["sharded"] = error_of(lambda: run(sharded, tokenizer, one_task, dense))

    # The last one: who is interrupted does not speak to the others any more, and lives on.
    with model.lm_head.register_forward_pre_hook(raising(KeyboardInterrupt("stop"), 2)):
        errors["an interrupt"] = error_of(small)
    found["errors"] = errors
    Path(result).write_text(json.dumps(found))
    while RANK == 1 and not (out / "0.json").exists():
        time.sleep(0.1)
    torch.distributed.destroy_process_group()


def raising_full(cell: Any) -> None:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    main(*sys.argv[1:])
