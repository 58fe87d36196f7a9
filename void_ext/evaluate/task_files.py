"""Task files of the user's: read as data, and refused where lm-eval would run code that they bring.

lm-eval imports what ``!function`` names, renders ``{{ … }}`` with an unrestricted template engine, loads metrics from
scripts and hands generation settings to transformers. A file is therefore parsed here first, with everything it
includes; without ``allow_code`` the harness is given the parsed values and never opens the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAX_BYTES = 4 << 20
_HINTS = 5  # files named in a message
TEMPLATE = re.compile(r"\{\{|\{%|\{#")
#: Builders of the package datasets that read data and nothing else; "pandas" unpickles.
_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
_CODE_KEYS = {
    "class": "names a Python class",
    "use_prompt": "takes a prompt template from elsewhere",
    "custom_dataset": "makes its documents with code",
    "unsafe_code": "runs code that the model writes",
    "hf_evaluate": "loads a metric's script",
    "trust_remote_code": "asks for code from a hub repository to be run",
    "custom_generate": "generates with code from a hub repository",
}
_HOW = (
    "Read the file, and pass allow_code (--allow-task-code) if you trust it. Without code: put finished prompts into "
    "the data and name its columns (doc_to_text: question, doc_to_choice: choices, doc_to_target: answer)"
)


class TaskFileError(ValueError):
    """A task file cannot be used; the message says which, where in it, and what to do."""


@dataclass(frozen=True)
class _Tagged:
    """A value with a tag of its own, such as ``!function``."""

    tag: str


@dataclass
class TaskFile:
    """A task or a group as its file says.

    Attributes:
        config: the parsed values, those of included files under its own.
        code: in words, what of it can run code; empty: nothing.
    """

    name: str
    path: Path
    config: dict[str, Any]
    code: list[str] = field(default_factory=list)

    @property
    def is_group(self) -> bool:
        return "group" in self.config and "class" not in self.config

    @property
    def tags(self) -> list[str]:
        given = self.config.get("tag")
        return [given] if isinstance(given, str) else [str(tag) for tag in given or ()]


class TaskFiles(dict[str, TaskFile]):
    """Task files by name, and what is wrong with the files of a directory that were passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[Path, TaskFileError] = {}

    def hint(self) -> str:
        """What was passed over, for the end of a message about a name that is not found; empty: nothing."""
        if not self.skipped:
            return ""
        lines = [str(error) for error in self.skipped.values()]
        more = f"; and {len(lines) - _HINTS} more" if len(lines) > _HINTS else ""
        return f". Files of --task-path that could not be used: {'; '.join(lines[:_HINTS])}{more}"


def read_task_files(paths: Iterable[str | os.PathLike[str]]) -> TaskFiles:
    """All tasks and groups under ``paths`` (files, or directories with ``.yaml`` files below them) by name.

    Nothing is run, whatever the files hold. Raises TaskFileError for a file that is no task (one of a directory is
    passed over, and kept in ``skipped``), FileNotFoundError for a path that is not there.
    """
    found = TaskFiles()
    for given in paths:
        path = Path(given).expanduser()
        for file in _files(path):
            try:
                one = _read(file)
            except TaskFileError as error:
                if path.is_dir():  # parts that others include, prompts, notes; or a task with a slip in it
                    found.skipped[file] = error
                    continue
                raise
            if one.name in found and found[one.name].path != one.path:
                raise TaskFileError(f"task {one.name!r}: defined in both {found[one.name].path} and {one.path}")
            found[one.name] = one
    return found


def refuse_code(files: Iterable[TaskFile]) -> None:
    """Raise TaskFileError if one of these can run code."""
    for file in files:
        if file.code:
            raise TaskFileError(f"{file.path}: this task can run code: {'; '.join(file.code[:4])}. {_HOW}")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("**/*.yaml"))
        if not files:
            raise FileNotFoundError(f"--task-path: no .yaml file below {path}")
        return files
    if not path.is_file():
        raise FileNotFoundError(f"--task-path: no file or directory at {path}")
    return [path]


def _read(path: Path) -> TaskFile:
    code: list[str] = []
    config = _merged(path.resolve(), code, ())
    name = config.get("group") if "group" in config and "class" not in config else config.get("task")
    if not isinstance(name, str) or not name:
        raise TaskFileError(f"{path}: expected a task file, with an entry 'task' or 'group' that names it")
    return TaskFile(name, path, config, list(dict.fromkeys(code)))


def _merged(path: Path, code: list[str], above: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file over those of the files it includes, as lm-eval puts them together."""
    if path in above:
        raise TaskFileError(f"{path}: includes itself")
    values = _parse(path)
    code.extend(_findings(values, path))
    includes = values.pop("include", [])
    merged: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        if not isinstance(name, str):
            raise TaskFileError(f"{path}: expected the name of a file behind 'include', got {name!r}")
        included = _merged((path.parent / name).resolve(), code, (*above, path))
        included.pop("task_list", None)
        merged |= included
    return merged | values


def _parse(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Knows plain values; keeps any other tag as a mark."""

    def tagged(loader: Any, suffix: str, node: Any) -> _Tagged:
        return _Tagged(f"!{suffix}" if not suffix.startswith("tag:") else suffix)

    Loader.add_multi_constructor("!", tagged)
    Loader.add_multi_constructor("tag:yaml.org,2002:python", lambda *_: _Tagged("!!python"))
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise TaskFileError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > _MAX_BYTES:
        raise TaskFileError(f"{path}: expected a task file of at most {_MAX_BYTES} bytes")
    if b"&" in data and b"*" in data and _aliases(data) > 100:
        raise TaskFileError(f"{path}: expected at most 100 aliases")
    try:
        values = yaml.load(data, Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise TaskFileError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise TaskFileError(f"{path}: expected names with values, got {type(values).__name__}")
    return values


def _aliases(data: bytes) -> int:
    # A few nested aliases can stand for billions of values.
    return len(re.findall(rb"(?:^|[\s,\[:-])\*[^\s,\]]+", data))


def _findings(values: dict[str, Any], path: Path) -> Iterator[str]:
    """In words, what in these values makes lm-eval, datasets or transformers run code."""
    for where, value in _walk(values, ""):
        key = re.sub(r"\[\d+\]$", "", where.rsplit(".", 1)[-1])
        if isinstance(value, _Tagged):
            yield f"{where} is a {value.tag}"
        elif isinstance(value, str) and TEMPLATE.search(value):
            yield f"{where} is a template ({_short(value)}), which only a field's plain name is not"
        if key in _CODE_KEYS and value not in (None, False):
            yield f"{where} {_CODE_KEYS[key]}"
        if key == "dataset_path":
            yield from _findings_of_data(where, value, path)
        if key == "metric" and isinstance(value, str) and not _is_known_metric(value):
            yield f"{where}: {value!r} is no metric of lm-eval, which would look for a script of that name"


def _findings_of_data(where: str, value: Any, path: Path) -> Iterator[str]:
    if not isinstance(value, str) or value in _BUILDERS:
        return
    place = Path(value).expanduser()
    if value.endswith(".py"):
        yield f"{where} is a script ({value})"
    elif place.is_dir():
        if any(place.glob("**/*.py")):
            yield f"{where}: the directory {value} holds scripts"
    elif "/" not in value or place.exists():
        yield f"{where}: expected one of {', '.join(_BUILDERS)}, a directory or a hub id (owner/name), got {value!r}"


def _is_known_metric(name: str) -> bool:
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import metric_registry

    return name in metric_registry


def _walk(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if where:
        yield where, value
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _walk(entry, f"{where}.{name}" if where else str(name))
            if isinstance(name, str) and TEMPLATE.search(name):
                yield f"{where}.{name}", name
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _walk(entry, f"{where}[{index}]")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 50 else line[:47] + "..."
