"""Plan files: JSON of one fixed shape; data, never code. Anything else is refused with the entry that is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from void_ext import _options
from void_ext._files import replacing
from void_ext._fingerprint import SIZES, Fingerprint, Weights
from void_ext._phase_plan import Action, PhasePlan

if TYPE_CHECKING:
    from void_ext.plan import VoidPlan

FORMAT = "void_ext.plan"
VERSION = 1
#: Room for 1000 rows of 100 layers; nobody's editor opens more.
MAX_BYTES = 8 << 20
_MAX_DEPTH = 8  # a plan has 4
_MAX_DIGITS = 18
_MAX_SOURCE = 10_000

_ACTIONS = {action.name.lower(): action for action in Action}
_NAMES = {action: name for name, action in _ACTIONS.items()}


# ---- writing ----


def to_dict(plan: VoidPlan) -> dict[str, Any]:
    """See :meth:`void_ext.VoidPlan.to_dict`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": plan.source,
        "layers": plan.layers,
        "prompt": _phase_to_dict(plan.prompt),
        "response": _phase_to_dict(plan.response),
        "fingerprint": None if plan.fingerprint is None else _lists(dataclasses.asdict(plan.fingerprint)),
    }


def save(plan: VoidPlan, path: Path, *, force: bool) -> Path:
    """See :meth:`void_ext.VoidPlan.save`."""
    entries = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in to_dict(plan).items())
    data = ("{\n" + ",\n".join(entries) + "\n}\n").encode()
    if len(data) > MAX_BYTES or len(plan.source) > _MAX_SOURCE:
        raise ValueError(
            f"plan: expected at most {MAX_BYTES} bytes of JSON and {_MAX_SOURCE} characters of source, which is what "
            f"load() reads, got {len(data)} and {len(plan.source)}"
        )
    with replacing(path, force=force) as temporary:
        temporary.write_bytes(data)
    return path


def _phase_to_dict(phase: PhasePlan) -> dict[str, Any]:
    def names(table: Any) -> Any:
        return [names(entry) if isinstance(entry, tuple) else _NAMES[entry] for entry in table]

    return {"attention": names(phase.attention), "mlp": names(phase.mlp)}


def _lists(value: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _lists(entry) if isinstance(entry, dict) else list(entry) if isinstance(entry, tuple) else entry
        for name, entry in value.items()
    }


# ---- reading ----


def load(path: Path) -> VoidPlan:
    """See :meth:`void_ext.VoidPlan.load`."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no plan file at {path}")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return from_dict(_parse(data))
    except ValueError as error:
        raise ValueError(f"path: {path} is not a plan of void_ext: {error}") from None


def _parse(data: bytes) -> Any:
    if len(data) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, got byte {data[error.start]:#04x} at {error.start}") from None
    _check_depth(text)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=lambda name: _refuse(f"expected JSON, got the number {name}"),
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON: {error}") from None
    except RecursionError:  # out of reach behind the check of the depth; Python's limit may be set lower
        raise ValueError("expected less nesting") from None


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


def _check_depth(text: str) -> None:
    # Without escapes, every second piece between quotes is a string. Linear, whatever the file holds.
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    depth = 0
    for match in re.finditer(r"[][{}]", outside):
        depth += 1 if match[0] in "[{" else -1
        if depth > _MAX_DEPTH:
            raise ValueError(f"expected at most {_MAX_DEPTH} levels of nesting")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"entry {_short(name)}: expected once, got it twice")
        result[name] = value
    return result


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"expected numbers of at most {_MAX_DIGITS} digits, got one of {len(digits)}")
    return int(digits)


def from_dict(value: Any) -> VoidPlan:
    """See :meth:`void_ext.VoidPlan.from_dict`."""
    from void_ext.plan import VoidPlan

    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"expected an object with the entry 'format': {FORMAT!r}, got {_short(value)}")
    # The version comes before the other entries: in another one they may be others.
    version = value.get("version")
    if not _is_int(version) or version != VERSION:
        raise ValueError(f"entry 'version': this void_ext reads plans of version {VERSION}, got {_short(version)}")
    _check_keys("", value, ("format", "version", "source", "layers", "prompt", "response", "fingerprint"))
    source = _text("source", value["source"])
    layers = _number("layers", value["layers"], least=1)
    phases = [_phase(name, value[name], layers) for name in ("prompt", "response")]
    return VoidPlan(phases[0], phases[1], _fingerprint(value["fingerprint"], layers), source)


def _check_keys(where: str, value: Any, names: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"entry {where!r}: expected an object, got {_short(value)}")
    for name in names:
        if name not in value:
            raise ValueError(f"entry {_join(where, name)!r}: expected, but missing")
    for name in value:
        if name not in names:
            raise ValueError(f"entry {_short(_join(where, str(name)))}: unknown; the entries are {', '.join(names)}")


def _phase(where: str, value: Any, layers: int) -> PhasePlan:
    _check_keys(where, value, ("attention", "mlp"))
    tables = [_actions(_join(where, name), value[name], layers) for name in ("attention", "mlp")]
    try:
        return PhasePlan(*tables)
    except ValueError as error:
        raise ValueError(f"entry {where!r}: {error}") from None


def _actions(where: str, value: Any, layers: int) -> Any:
    if not isinstance(value, list) or not value:
        raise ValueError(f"entry {where!r}: expected a list of actions, got {_short(value)}")
    if isinstance(value[0], list):
        return tuple(_row(f"{where}[{index}]", row, layers) for index, row in enumerate(value))
    return _row(where, value, layers)


def _row(where: str, value: Any, layers: int) -> tuple[Action, ...]:
    if not isinstance(value, list) or len(value) != layers:
        got = f"{len(value)}" if isinstance(value, list) else _short(value)
        raise ValueError(f"entry {where!r}: expected a list of {layers} actions, got {got}")
    for layer, name in enumerate(value):
        if not isinstance(name, str) or name not in _ACTIONS:
            raise ValueError(f"entry '{where}[{layer}]': expected one of {', '.join(_ACTIONS)}, got {_short(name)}")
    return tuple(_ACTIONS[name] for name in value)


def _fingerprint(value: Any, layers: int) -> Fingerprint | None:
    if value is None:
        return None
    where = "fingerprint"
    _check_keys(where, value, tuple(field.name for field in dataclasses.fields(Fingerprint)))
    sizes = {name: _number(_join(where, name), value[name]) for name in SIZES}
    if not isinstance(value["quantised"], bool):
        raise ValueError(f"entry '{where}.quantised': expected true or false, got {_short(value['quantised'])}")
    norms = value["norms"]
    if not isinstance(norms, str) or not re.fullmatch(r"([0-9a-f]{64})?", norms):
        raise ValueError(f"entry '{where}.norms': expected 64 hexadecimal digits or '', got {_short(norms)}")
    return Fingerprint(
        model_type=_text(f"{where}.model_type", value["model_type"]),
        norms=norms,
        quantised=value["quantised"],
        weights=_weights(f"{where}.weights", value["weights"], layers),
        **sizes,
    )


def _weights(where: str, value: Any, layers: int) -> Weights:
    _check_keys(where, value, tuple(field.name for field in dataclasses.fields(Weights)))
    tables = {}
    for name in ("attention", "project", "mlp"):
        table = value[name]
        if not isinstance(table, list) or len(table) != layers:
            raise ValueError(f"entry '{where}.{name}': expected a list of {layers} numbers, got {_short(table)}")
        tables[name] = tuple(_number(f"{where}.{name}[{layer}]", given) for layer, given in enumerate(table))
    return Weights(**tables, other=_number(f"{where}.other", value["other"]))


def _number(where: str, value: Any, least: int = 0) -> int:
    if not _is_int(value) or not least <= value < 10**_MAX_DIGITS:
        raise ValueError(f"entry {where!r}: expected a whole number >= {least}, got {_short(value)}")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_SOURCE:
        raise ValueError(f"entry {where!r}: expected text of at most {_MAX_SOURCE} characters, got {_short(value)}")
    if _options.has_half_pair(value):  # would fail when it is printed, far from here
        raise ValueError(f"entry {where!r}: expected text, got half of a surrogate pair")
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _short(value: Any) -> str:
    """What came, in a few characters, however much that was."""
    text = reprlib.repr(value) if _is_plain(value) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool, float)) or (_is_int(value) and abs(value) < 10**_MAX_DIGITS)
