"""Finished work: one cell per (task, mode, seed), and the directory that keeps cells so that a run can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from void_ext._files import TEMPORARY, check_output, replacing, reworded
from void_ext.evaluate.tally import PhaseUsage

FORMAT = "void_ext.evaluation"
VERSION = 1
RUN, CELLS, LOCK = "run.json", "cells", ".lock"
_FLOAT = "float"
_RESULTS = ("results.json", "results.md", "results.png", "protocol.json", "protocol.md", "answers.jsonl")


@dataclass(frozen=True)
class Item:
    """One document's answers.

    Attributes:
        doc_id: its index in the task's documents.
        metrics: what the task's ``process_results`` gave; of other filters than ``none`` as ``"metric,filter"``.
        answers: generated text after the filters, or the log-likelihood of each choice.
    """

    doc_id: int
    metrics: dict[str, Any]
    answers: list[Any]


@dataclass(frozen=True)
class Cell:
    """One task in one mode with one seed.

    Attributes:
        items: in the order of the documents.
        usage: per phase; log-likelihood requests are all prompt.
        counters: what skipping launched (``Counters.to_dict()``), None where all layers ran.
        layers: of the model.
        requests: the harness's requests; some share a forward call.
        seconds: of the harness's own request loop; of several processes, the slowest one's.
    """

    task: str
    mode: str
    seed: int
    items: list[Item]
    usage: dict[str, PhaseUsage]
    counters: dict[str, Any] | None
    layers: int
    requests: int
    seconds: float

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.mode, self.seed

    @property
    def tokens(self) -> int:
        """Real tokens that went through the model."""
        return sum(phase.tokens for phase in self.usage.values())

    def layers_computed(self) -> float:
        """Layers launched per forward call, a half as 0.5; phases weighted by their tokens."""
        if self.counters is None or not self.tokens:
            return float(self.layers)
        total = 0.0
        for name, phase in self.usage.items():
            counted = self.counters[name]
            halves = counted["attention_run"] + counted["mlp_run"]
            total += phase.tokens * halves / (2 * counted["calls"]) if counted["calls"] else 0.0
        return total / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for ``json.dumps(allow_nan=False)``."""
        return dict(plain(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Cell:
        """What :meth:`to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        items = [Item(int(i["doc_id"]), restored(i["metrics"]), restored(i["answers"])) for i in value["items"]]
        usage = {
            name: PhaseUsage(int(u["tokens"]), dict(u["active"]), list(u["executed"]))
            for name, u in value["usage"].items()
        }
        return cls(
            task=str(value["task"]),
            mode=str(value["mode"]),
            seed=int(value["seed"]),
            items=items,
            usage=usage,
            counters=value["counters"],
            layers=int(value["layers"]),
            requests=int(value["requests"]),
            seconds=float(value["seconds"]),
        )


class CellStore:
    """Cells in a directory: ``run.json`` says of which configuration, ``cells/`` holds a file for each.

    One run at a time uses a directory, ``force`` or not: :meth:`begin` locks it, and so does entering a ``with`` where
    the directory is there already, so that no work is spent before it is refused. The lock is the kernel's, on the file
    ``.lock``: it goes with :meth:`close`, at the end of the ``with``, or with the process, however that ends, and those
    it has forked. On a file system without locks ``run.json`` is looked at again before each write, and a run stops
    where another has begun.

    Of several processes that share a run, the first alone holds the store.

    Args:
        directory: made if it does not exist; its parent must.
        force: throw an earlier run in it away, a damaged one too.

    Attributes:
        begun: :meth:`begin` has been called, so that the cells in the directory are this run's.

    Raises:
        OSError: the place cannot be written.
        ValueError: it holds a run of another configuration, or files that are no run, or another run is using it;
            nothing is changed then.
    """

    def __init__(self, directory: str | Path, *, force: bool = False):
        self.directory = Path(directory)
        self.force = force
        self.batch_size: int | None = None
        self.begun = False
        self._run: dict[str, Any] = {}
        self._lock: IO[bytes] | None = None
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"directory: expected a directory, {str(directory)!r} is a file")
        found = self._read_run(force)
        if found is not None and not force:
            self.batch_size = found.get("batch_size")
        if self.directory.is_dir():
            check_output(self.directory / RUN, what="directory", force=True)
        else:
            check_output(self.directory, what="directory")

    def __enter__(self) -> CellStore:
        if self.directory.is_dir():
            self._hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others use the directory."""
        lock, self._lock = self._lock, None
        if lock is not None:
            # Not by closing alone: processes that were forked meanwhile hold the file too.
            with lock, contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)

    def begin(self, configuration: Mapping[str, Any], batch_size: int) -> dict[tuple[str, str, int], Cell]:
        """Give the cells that are finished already; from now on cells can be added.

        Raises ValueError, with nothing changed, where the directory is another run's or one is using it, and OSError.
        """
        self.directory.mkdir(exist_ok=True)
        self._hold()
        # Once more: others may have begun, or ended, since this store was made.
        found = self._read_run(self.force)
        run = {"format": FORMAT, "version": VERSION, "batch_size": batch_size, "configuration": plain(configuration)}
        if found is None or self.force:
            if self.force:
                self._clear()
            # Before anything else: a directory that holds more and no run.json is refused ever after.
            self._write(self.directory / RUN, run, new=True)
        elif found["configuration"] != run["configuration"]:
            where = differences(found["configuration"], run["configuration"])
            raise ValueError(
                f"directory: {str(self.directory)!r} holds a run of another configuration ({where}); take another "
                "directory, or pass force (--force) to throw that run away"
            )
        elif found != run:
            self.batch_size = found.get("batch_size")
            raise ValueError(
                f"directory: {str(self.directory)!r} holds this run at batch size {self.batch_size}, begun since this "
                f"one looked and chose {batch_size}; run the same command again, and it goes on from there"
            )
        self._run, self.begun = run, True
        (self.directory / CELLS).mkdir(exist_ok=True)
        return self._read_cells()

    def add(self, cell: Cell) -> None:
        """Keep a finished cell. Raises ValueError where the directory is no longer this run's."""
        assert self.begun
        self._check_own()
        self._write(self._path(cell.key), cell.to_dict())

    def _hold(self) -> None:
        if self._lock is not None:
            return
        try:
            lock = open(self.directory / LOCK, "ab")  # noqa: SIM115 - for as long as the run
        except OSError:
            return  # of another user, say: as without locks
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(
                f"directory: expected one that no other run is using, got {str(self.directory)!r}; wait until that run "
                "has ended, or take another directory"
            ) from None
        except OSError:
            lock.close()  # a file system without locks
        else:
            self._lock = lock

    def _check_own(self) -> None:
        """A lock does not tell of a directory that somebody has removed, and not everywhere are there locks."""
        try:
            there = _read(self.directory / RUN)
        except (FileNotFoundError, ValueError):
            there = None
        if there != self._run:
            self.begun = False
            what = "no run" if there is None else "another run"
            raise ValueError(
                f"directory: expected {str(self.directory)!r} to hold this run as long as it lasts, got {what}: it was "
                "removed or thrown away (--force) meanwhile. What this run finishes cannot be kept there; give it "
                "another directory"
            )

    def _path(self, key: tuple[str, str, int]) -> Path:
        return self.directory / CELLS / (hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24] + ".json")

    def _write(self, path: Path, value: Any, *, new: bool = False) -> None:
        try:
            with replacing(path, what="directory", force=not new) as temporary:
                temporary.write_text(json.dumps(value, allow_nan=False) + "\n", encoding="utf-8")
        except FileExistsError:
            raise ValueError(
                f"directory: expected one that no other run is using, another began in {str(self.directory)!r} just "
                "now; wait until that run has ended, or take another directory"
            ) from None
        except OSError as error:
            goes_on = " without force (--force)" * self.force + ", and it goes on from what was finished before"
            raise reworded(
                error,
                f"{path} could not be written ({error.strerror or error}); make room, then run the same command again"
                + goes_on * self.begun,
            ) from error

    def _read_run(self, force: bool) -> dict[str, Any] | None:
        path = self.directory / RUN
        if not path.exists():
            if self.directory.is_dir() and not all(map(_is_left_over, self.directory.iterdir())):
                raise ValueError(
                    f"directory: {str(self.directory)!r} holds files and no {RUN}; expected an empty or new directory, "
                    "or one of an earlier run"
                )
            return None
        what_to_do = "take another directory, or pass force (--force) to throw that run away"
        try:
            value = _read(path)
        except ValueError as error:
            if force:
                return None
            raise ValueError(f"directory: {error}; {what_to_do}") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"directory: {path} is no run of void_ext's; take another directory")
        if value.get("version") == VERSION and isinstance(value.get("configuration"), dict):
            return value
        if force:
            return None
        raise ValueError(f"directory: {path} is no run of this version of void_ext; {what_to_do}")

    def _read_cells(self) -> dict[tuple[str, str, int], Cell]:
        cells = {}
        for path in sorted((self.directory / CELLS).glob("[!.]*.json")):
            try:
                cell = Cell.from_dict(_read(path))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"directory: {path} is damaged ({error!r}); delete it and it is run again") from None
            cells[cell.key] = cell
        return cells

    def _clear(self) -> None:
        for name in _RESULTS:
            (self.directory / name).unlink(missing_ok=True)
        if (self.directory / CELLS).is_dir():
            shutil.rmtree(self.directory / CELLS)
        # Last: whoever is stopped before this leaves what is known as a run, and can be thrown away again.
        (self.directory / RUN).unlink(missing_ok=True)


def _is_left_over(path: Path) -> bool:
    """Whether a run that was stopped before its ``run.json`` was there can have left this: nothing is lost with it."""
    if path.name == LOCK:
        return True
    if path.name == CELLS:
        return path.is_dir() and not any(path.iterdir())
    return path.name.startswith(TEMPORARY)


def plain(value: Any) -> Any:
    """``value`` with nothing in it but what JSON knows: ``nan`` becomes ``{"float": "nan"}``, tuples become lists."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if hasattr(value, "tolist"):  # numpy
        return plain(value.tolist())
    return str(value)


def restored(value: Any) -> Any:
    """What :func:`plain` made JSON of, with its numbers that are not finite."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        return {name: restored(entry) for name, entry in value.items()}
    return [restored(entry) for entry in value] if isinstance(value, list) else value


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def differences(old: Any, new: Any) -> str:
    """Where two configurations differ: the first few places."""
    return "; ".join(_differences(old, new)[:4])


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys((*old, *new))
        return [
            line for name in names for line in _differences(old.get(name), new.get(name), f"{where}.{name}".strip("."))
        ]
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for index, pair in enumerate(zip(old, new, strict=True))
            for line in _differences(*pair, f"{where}[{index}]")
        ]
    return [f"{where}: {_short(old)} there, {_short(new)} here"]


def _short(value: Any) -> str:
    """A value in a few words; what has parts by their names or their number."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return str(value["label"]) if "label" in value else f"{len(value)} entries"
    if isinstance(value, list):
        parts = [_short(entry) for entry in value]
        value = ", ".join(parts) or "none"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
