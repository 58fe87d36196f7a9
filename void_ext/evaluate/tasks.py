"""Task objects by name: the user's files first, then the harness's own; and errors that say what to do."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from void_ext.evaluate.settings import TaskRun, require_harness
from void_ext.evaluate.task_files import (
    TEMPLATE,
    TaskFile,
    TaskFileError,
    TaskFiles,
    read_task_files,
    refuse_code,
)
from void_ext.models._common import Progress, silent
from void_ext.models._load import hub_out_of_reach

_NESTING_MOST = 8


class DataError(OSError):
    """The documents of a task cannot be had."""


def load_tasks(
    names: Sequence[str],
    paths: Iterable[str | os.PathLike[str]] = (),
    *,
    allow_code: bool = False,
    progress: Progress = silent,
) -> dict[str, TaskRun]:
    """The tasks of these names, groups and tags taken apart; tasks of a group are pooled under its name.

    Args:
        names: of tasks, groups or tags, in ``paths`` or of the harness (whose index takes a minute to build).
        paths: task files of the user's, or directories with them.
        allow_code: take files that can run code; they are read by lm-eval itself then.
        progress: called as ``progress(what, done, total)``.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: a name that is unknown (the message suggests others), or a file that is no task.
        TaskFileError: a file that can run code, without ``allow_code``; before lm-eval opens it.
        DataError: documents that are neither here nor to be had.
    """
    require_harness()
    progress("reading the task files", 0, 0)
    files = read_task_files(paths)
    own, others = {}, []
    for name in dict.fromkeys(names):
        members = list(_members(name, files, allow_code))
        if members:
            own[name] = members
        else:
            for path, error in files.skipped.items():
                if path.stem == name:  # else the harness's task of the same name would be taken
                    raise error
            others.append(name)
    found: dict[str, TaskRun] = {}
    for members in own.values():
        for config, group in members:
            progress("reading the documents", 0, 0)
            task = _own_task(config)
            _add(found, task.task_name, task, group)
    if others:
        progress("reading the harness's index of tasks", 0, 0)
        for task, group in _harness_tasks(others, files, progress):
            _add(found, task.task_name, task, group)
    return found


def _add(found: dict[str, TaskRun], name: str, task: Any, group: str | None) -> None:
    if name in found:
        raise ValueError(f"tasks: {name!r} is asked for twice, by itself or in groups; name it once")
    for metric, aggregation in task.aggregation().items():
        if not callable(aggregation):  # the harness would notice after it has answered everything
            raise ValueError(f"task {name!r}: lm-eval knows no aggregation of the name given for metric {metric!r}")
    found[name] = TaskRun(task, group=group)


# ---- the user's ----


def _members(
    name: str, files: TaskFiles, allow_code: bool, group: str | None = None, depth: int = 0
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """``(config, group)`` of every task that ``name`` stands for among the user's files."""
    if depth > _NESTING_MOST:
        raise TaskFileError(f"task {name!r}: groups are nested more than {_NESTING_MOST} deep, or in a circle")
    file = files.get(name)
    if file is None:
        for tagged in (one for one in files.values() if name in one.tags):
            yield from _members(tagged.name, files, allow_code, group or name, depth + 1)
        return
    if not allow_code:
        refuse_code([file])
    if not file.is_group:
        yield _config(file, allow_code), group
        return
    listed = file.config.get("task")
    for member in listed if isinstance(listed, list) else [listed]:
        inner, overrides = (member.get("task"), member) if isinstance(member, dict) else (member, {})
        if not isinstance(inner, str) or inner not in files:
            raise TaskFileError(
                f"{file.path}: group {name!r}: expected names of tasks that --task-path has, got {inner!r}; "
                f"they are {', '.join(sorted(files))}{files.hint()}"
            )
        for config, _ in _members(inner, files, allow_code, group or name, depth + 1):
            changed = {key: value for key, value in overrides.items() if key != "task"}
            yield {**config, **changed}, group or name


def _config(file: TaskFile, allow_code: bool) -> dict[str, Any]:
    if allow_code and file.code:
        from lm_eval.tasks._yaml_loader import load_yaml

        return dict(load_yaml(file.path))  # functions and all
    return file.config


def _own_task(config: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    from void_ext.evaluate.harness import quiet

    name = str(config.get("task", "?"))
    manager = TaskManager(include_defaults=False)

    def load(values: dict[str, Any]) -> Any:
        return next(iter(manager.load([values])["tasks"].values()))

    with quiet(), _explained(name, config.get("dataset_path"), config.get("dataset_name")):
        try:
            task = load(config)
        except (ValueError, SyntaxError):
            # What is no column lm-eval evaluates as a list; without it the columns can be told.
            if isinstance(config.get("doc_to_choice"), str):
                rest = {key: value for key, value in config.items() if key != "doc_to_choice"}
                _check_columns(name, load(rest), config)
            raise
        _check_columns(name, task, config)
    return task


def _check_columns(name: str, task: Any, config: Mapping[str, Any]) -> None:
    """lm-eval takes a name that is no column as the prompt, or the answer, itself: the same for every document."""
    columns = getattr(task, "features", None)
    if columns is None or "use_prompt" in config:
        return
    shots = config.get("fewshot_config")
    for where, values in (("", config), ("fewshot_config.", shots if isinstance(shots, Mapping) else {})):
        for key in ("doc_to_text", "doc_to_choice", "doc_to_target"):
            value = values.get(key)
            if not isinstance(value, str) or not value or value in columns or TEMPLATE.search(value):
                continue
            if key == "doc_to_choice" and value.lstrip().startswith("["):  # a list that is written as a text
                continue
            raise TaskFileError(
                f"task {name!r}: {where}{key}: expected a column of its documents, got {value!r}; "
                f"they have {', '.join(map(str, columns))}"
            )


# ---- the harness's ----


def _harness_tasks(names: Sequence[str], files: TaskFiles, progress: Progress) -> Iterator[tuple[Any, str | None]]:
    from lm_eval.tasks import TaskManager

    from void_ext.evaluate.harness import quiet

    with quiet():
        manager = TaskManager()
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise ValueError(_unknown(name, [*files, *manager.all_tasks]) + files.hint())
    for name in names:
        progress(f"reading the documents of {name}", 0, 0)
        entry = manager.task_index[name]
        config = entry.cfg or {}
        with quiet(), _explained(name, config.get("dataset_path"), config.get("dataset_name")):
            tasks = manager.load([name])["tasks"]
        group = name if list(tasks) != [name] else None
        for task in tasks.values():
            yield task, group


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    near += [one for one in sorted(known, key=len) if name.lower() in one.lower() and one not in near][: 5 - len(near)]
    hint = f"did you mean {', '.join(near)}?" if near else "no name is near it."
    return (
        f"tasks: no task, group or tag is called {name!r}: {hint} `lm-eval ls tasks` lists the harness's own; files of "
        "yours are named with --task-path"
    )


class _explained:  # noqa: N801 - a context manager, used as a function is
    """Turns what datasets raises for documents that cannot be had into one message."""

    def __init__(self, name: str, path: str | None, config: str | None):
        self.name, self.path, self.config = name, path, config

    def __enter__(self) -> None:
        import datasets
        from huggingface_hub import constants

        # Without an address for the hub every request would be tried again and again before it fails.
        self._before = (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
        self._level = logging.getLogger("datasets").level
        logging.getLogger("datasets").setLevel(logging.ERROR)
        if hub_out_of_reach():
            datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        import datasets
        from huggingface_hub import constants

        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = self._before
        logging.getLogger("datasets").setLevel(self._level)
        if isinstance(error, TaskFileError):
            return
        if isinstance(error, (OSError, KeyError, ValueError, TypeError, RuntimeError)):
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> Exception:
        text = " ".join(str(error).split())
        what = f"task {self.name!r}"
        if isinstance(error, FileNotFoundError) and self.path in ("json", "csv", "parquet", "text", "arrow"):
            return DataError(f"{what}: a file that it names is not there: {text}")
        if _is_unreachable(error):
            named = ", ".join(json.dumps(str(name)) for name in (self.path, self.config) if name)
            call = f"datasets.load_dataset({named})"
            return DataError(
                f"{what}: its documents ({self.path or 'a data set of the hub'}) are not in the Hugging Face cache, "
                f"and the hub cannot be reached. On a machine with network run `python -c 'import datasets; {call}'` "
                f"and copy its cache ({_cache()}) here; or write a task file over local files (dataset_path: json, "
                "dataset_kwargs: {data_files: …}) and name it with --task-path"
            )
        if isinstance(error, KeyError):
            return ValueError(f"{what}: a field or a split that it names is not in its documents: {text}")
        return ValueError(f"{what} could not be loaded: {type(error).__name__}: {text}")


def _is_unreachable(error: BaseException | None) -> bool:
    seen = 0
    while error is not None and seen < 20:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "gaierror", "ConnectError"}:
            return True
        if "DatasetNotFoundError" in names or "couldn't find" in str(error).lower():
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def _cache() -> str:
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)
