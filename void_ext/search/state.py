"""The file that a search goes on from: everything measured so far, written anew after every plan and every step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from void_ext._files import replacing, reworded
from void_ext.search.greedy import Step, screen
from void_ext.search.measure import Quality

FORMAT = "void_ext.search"
VERSION = 1
MAX_BYTES = 64 << 20
_ROLES = ("calibration", "held_out")


@dataclass
class State:
    """What is known so far.

    Attributes:
        configuration: all that the results depend on; a state of another one is not taken.
        rankings: method, budget and halves off of the plans that were not searched; of every budget ever asked for.
        measured: ``role/halves`` -> quality, for every plan on every text.
        steps: kind of units -> the steps of its search.
        pending: what the step under way has measured; see :class:`void_ext.search.greedy.Greedy`.
    """

    configuration: dict[str, Any]
    rankings: list[tuple[str, int, frozenset[int]]] = field(default_factory=list)
    measured: dict[str, Quality] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)
    pending: dict[str, Quality] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Replace the file, whole or not at all. An OSError says that the one before is still there."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "configuration": self.configuration,
            "rankings": [[method, budget, sorted(off)] for method, budget, off in self.rankings],
            "measured": {key: quality.to_dict() for key, quality in self.measured.items()},
            "steps": {
                kind: [
                    {
                        "how": step.how,
                        "off": sorted(step.off),
                        "quality": step.quality.to_dict(),
                        "damages": step.damages,
                    }
                    for step in steps
                ]
                for kind, steps in self.steps.items()
            },
            "pending": {key: quality.to_dict() for key, quality in self.pending.items()},
        }
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        try:
            with replacing(path, what="state", force=True) as temporary:
                temporary.write_text(text)
        except OSError as error:
            raise reworded(
                error,
                f"state: {path} could not be written: {error.strerror or error}; what was measured before is kept, and "
                "the same search goes on from there",
            ) from error

    @classmethod
    def load(cls, path: Path, configuration: dict[str, Any]) -> State:
        """Read what :meth:`save` wrote.

        Raises ValueError for a file that is damaged or something else, and for a search with another configuration,
        naming the first entry that differs.
        """
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        try:
            document = _parse(data)
            # Compared first: what the entries must look like depends on it.
            different = _difference("", document["configuration"], configuration)
            state = None if different else _state(document, sequences=configuration["sequences"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"state: {path} is damaged or no state of a search: {what}; move it away, or begin anew with --force"
            ) from None
        if different:
            name, theirs, ours = different
            raise ValueError(
                f"state: {path} belongs to another search: {name} is {theirs} there and {ours} now; give another "
                "--out, the options of that search, or --force to begin anew"
            )
        assert state is not None
        return state


def budgets_in(path: Path) -> list[int]:
    """The budgets that the search of a state file was ever asked for; none where there is no file or a damaged one."""
    try:
        with path.open("rb") as file:
            document = _parse(file.read(MAX_BYTES + 1))
        return sorted({_whole(budget) for _, budget, _ in _list(document["rankings"])})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def key_of(role: str, off: Iterable[int]) -> str:
    """The entry of :attr:`State.measured` for a plan on a text."""
    return f"{role}/{' '.join(map(str, sorted(off)))}"


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES} bytes")
    document = json.loads(data.decode(), parse_constant=lambda name: _number(name))
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"expected an object with the entry 'format': {FORMAT!r}")
    if document.get("version") != VERSION:
        raise ValueError(f"this void_ext reads version {VERSION}, got {document.get('version')!r}")
    if not isinstance(document["configuration"], dict):
        raise ValueError("entry 'configuration': expected an object")
    return document


def _state(document: dict[str, Any], sequences: int) -> State:
    return State(
        configuration=document["configuration"],
        rankings=[(_text(method), _whole(budget), _halves(off)) for method, budget, off in _list(document["rankings"])],
        measured={key: _quality(value, sequences) for key, value in document["measured"].items()},
        steps={
            kind: [
                Step(
                    _text(step["how"]),
                    _halves(step["off"]),
                    _quality(step["quality"], sequences),
                    {unit: _number(damage) for unit, damage in step["damages"].items()},
                )
                for step in _list(steps)
            ]
            for kind, steps in document["steps"].items()
        },
        pending={
            key: _quality(value, sequences if key.startswith("all/") else len(screen(sequences)))
            for key, value in document["pending"].items()
        },
    )


def _quality(value: Any, sequences: int) -> Quality:
    parts = [tuple(map(_number, _list(value[name]))) for name in ("kl", "nll", "agreement")]
    if any(len(part) != sequences for part in parts):
        raise ValueError(f"expected values of {sequences} sequences, got {[len(part) for part in parts]}")
    return Quality(*parts)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got a {type(value).__name__}")
    return value


def _halves(value: Any) -> frozenset[int]:
    return frozenset(map(_whole, _list(value)))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r:.80}")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected a whole number, got {value!r:.80}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got a {type(value).__name__}")
    return value


def _difference(where: str, theirs: Any, ours: Any) -> tuple[str, str, str] | None:
    """The first entry that two configurations do not share: its name and both values, short."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in (*ours, *(name for name in theirs if name not in ours)):
            path = f"{where}.{name}" if where else name
            if found := _difference(path, theirs.get(name), ours.get(name)):
                return found
        return None
    return None if theirs == ours else (where, f"{theirs!r:.60}", f"{ours!r:.60}")
