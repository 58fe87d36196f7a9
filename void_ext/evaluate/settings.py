"""What is to be evaluated, and how: tasks, and the settings that all of them share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from void_ext import _options


@dataclass(frozen=True)
class TaskRun:
    """A task with what one entry of the run needs.

    Attributes:
        task: an ``lm_eval.api.task.Task``.
        generation: updates the task's ``generation_kwargs``.
        seeds: replaces the settings' seeds.
        group: entries with the same one, and the same seeds, have their documents pooled in one more row of the report.
    """

    task: Any
    generation: Mapping[str, Any] | None = None
    seeds: tuple[int, ...] | None = None
    group: str | None = None


@dataclass(frozen=True)
class Settings:
    """What all tasks and modes share.

    Attributes:
        batch_size: rows per call, or ``"auto"``: the largest that fits on a GPU, 8 on a CPU.
        limit: at most so many documents a task; below 1 a share of them.
        seeds: one run of each task and mode per seed: of few-shot examples, sampling, and torch, numpy and random.
        alpha: at which usage is told, beside the modes' own.
        fuse: as in ``void_ext.patch``.
        num_fewshot: examples in the prompt; None: what the task says. A task that says 0 keeps 0.
        apply_chat_template: put prompts into the tokenizer's chat template.
        system_instruction: a system message.
        confidence: of all intervals.
        unsafe_code: run tasks that run code which the model writes.
    """

    batch_size: int | str = "auto"
    limit: float | None = None
    seeds: tuple[int, ...] = (0,)
    alpha: float = 0.8
    fuse: str = "add"
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    confidence: float = 0.95
    unsafe_code: bool = False

    def __post_init__(self) -> None:
        size = self.batch_size
        if size != "auto" and not (_is_whole(size) and size >= 1):
            raise ValueError(f'batch_size: expected "auto" or a whole number >= 1, got {size!r}')
        if self.limit is not None and not _is_limit(self.limit):
            raise ValueError(f"limit: expected a whole number >= 1 or a share between 0 and 1, got {self.limit!r}")
        _check_seeds("seeds", self.seeds)
        _options.check_alpha(self.alpha)
        _options.check_choice("fuse", self.fuse, _options.FUSES)
        if self.num_fewshot is not None and not (_is_whole(self.num_fewshot) and self.num_fewshot >= 0):
            raise ValueError(f"num_fewshot: expected a whole number >= 0, or None, got {self.num_fewshot!r}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence: expected a share between 0 and 1, got {self.confidence}")


def require_harness() -> None:
    """ModuleNotFoundError, with what to do, where lm-eval is not installed."""
    try:
        import lm_eval
        import lm_eval.models.huggingface  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'evaluation needs the package lm-eval (here {error.name} is missing): pip install "void-ext[eval]"',
            name=error.name,
        ) from None


def check_tasks(tasks: Mapping[str, Any]) -> dict[str, TaskRun]:
    from lm_eval.api.task import Task

    if not tasks:
        raise ValueError("tasks: expected at least one, got none")
    found = {}
    for name, given in tasks.items():
        entry = given if isinstance(given, TaskRun) else TaskRun(given)
        if not isinstance(entry.task, Task):
            raise TypeError(f"tasks: expected lm_eval tasks or TaskRun, got {type(entry.task).__name__} for {name!r}")
        if entry.seeds is not None:
            _check_seeds(f"seeds of {name!r}", entry.seeds)
        found[name] = entry
    groups = {entry.group for entry in found.values()} - {None}
    if both := groups & set(found):
        raise ValueError(f"tasks: a group is called as a task is: {', '.join(sorted(map(str, both)))}")
    return found


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_limit(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value < 1 or (1 <= value < math.inf and value == int(value))


def _check_seeds(what: str, seeds: Sequence[int]) -> None:
    whole = bool(seeds) and all(_is_whole(seed) and 0 <= seed < 2**32 for seed in seeds)
    if not whole or len(set(seeds)) != len(seeds):
        raise ValueError(f"{what}: expected different whole numbers from 0 to 2^32 - 1, got {list(seeds)}")
