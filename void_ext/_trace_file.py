"""Trace files: safetensors with a JSON header entry; data, never code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from void_ext import _options
from void_ext._files import replacing
from void_ext.store import TraceInfo, TraceStore

_FORMAT = "void_ext.trace"
_VERSION = 1
_KEY = "void_ext"
_SMALL = 64 << 20  # bytes that any file may ask for


def save(store: TraceStore, info: TraceInfo, path: Path, *, tokens: bool, force: bool) -> Path:
    """Write all seen positions of ``store``; see :meth:`void_ext.Trace.save`."""
    from safetensors.torch import save_file

    with replacing(path, force=force) as temporary:
        positions = [position for position, phase in enumerate(store.phase) if phase >= 0]
        phases = [store.phase[position] for position in positions]
        names = [name for name in ("norms", "updates", "halves") if store.has(name)]
        tables = {name: store.read(name, positions).cpu().contiguous() for name in names}
        tables["tokens"] = store.read("tokens", positions).cpu().contiguous()
        if not tokens:
            tables["tokens"].fill_(-1)
        tables["mask"] = store.read("mask", positions).cpu().to(torch.uint8)
        if store.has("executed"):
            tables["executed"] = store.read("executed", positions).cpu().to(torch.uint8)
        tables["positions"] = torch.tensor(positions, dtype=torch.int64)
        tables["phase"] = torch.tensor(phases, dtype=torch.uint8)
        tables["call"] = torch.tensor(store.calls(positions), dtype=torch.int64)
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "ordered": store.ordered,
            "layers": store.layers,
            **dataclasses.asdict(info),
        }
        save_file(tables, str(temporary), metadata={_KEY: json.dumps(header)})
    return path


def load(path: Path) -> tuple[TraceStore, TraceInfo]:
    """Read a trace file; ValueError names what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"path: no trace file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a safetensors file ({error})") from None
    header = _header(path, metadata)
    layers = header["layers"]
    count, batch = _check_tables(path, tables, layers)
    optional = {name: name in tables for name in ("updates", "halves", "executed")}
    store = TraceStore(batch, layers, torch.device("cpu"), **optional)
    store.ordered = header["ordered"]
    positions, phases, calls = (tables[name].tolist() for name in ("positions", "phase", "call"))
    for column in range(count):
        names = ["norms", *(name for name, there in optional.items() if there)]
        row = {name: tables[name][:, column : column + 1] for name in names}
        tokens, mask = (tables[name][:, column : column + 1] for name in ("tokens", "mask"))
        store.write(positions[column], 1, [phases[column]], calls[column], row, tokens, mask.bool())
    fields = {field.name: header[field.name] for field in dataclasses.fields(TraceInfo)}
    return store, TraceInfo(**fields)


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata[_KEY])
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"path: {path} is not a void_ext trace (no readable {_KEY!r} entry in its header)") from None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"path: {path} is not a void_ext trace")
    if header.get("version") != _VERSION:
        raise ValueError(f"path: {path} has trace version {header.get('version')!r}; this void_ext reads {_VERSION}")
    kinds = {field.name: field.type for field in dataclasses.fields(TraceInfo)} | {"ordered": "bool", "layers": "int"}
    for name, kind in kinds.items():
        if type(header.get(name)).__name__ != kind:
            raise ValueError(f"path: {path} header entry {name!r}: expected {kind}, got {header.get(name)!r}")
    _options.check_alpha(header["alpha"])
    _options.check_choice("granularity", header["granularity"], _options.GRANULARITIES)
    _options.check_choice("dtype", header["dtype"], ("float32", "float16", "bfloat16", "float64"))
    return header


def _check_tables(path: Path, tables: dict[str, Tensor], layers: int) -> tuple[int, int]:
    def wrong(name: str, expected: str) -> ValueError:
        got = f"{list(tables[name].shape)} {tables[name].dtype}" if name in tables else "nothing"
        return ValueError(f"path: {path} table {name!r}: expected {expected}, got {got}")

    if "mask" not in tables or tables["mask"].dim() != 2:
        raise wrong("mask", "[B, T]")
    batch, count = tables["mask"].shape
    expected = {
        "norms": ((batch, count, layers + 1), torch.float32),
        "updates": ((batch, count, layers), torch.float32),
        "halves": ((batch, count, layers), torch.float32),
        "executed": ((batch, count, layers), torch.uint8),
        "tokens": ((batch, count), torch.int64),
        "mask": ((batch, count), torch.uint8),
        "positions": ((count,), torch.int64),
        "phase": ((count,), torch.uint8),
        "call": ((count,), torch.int64),
    }
    for name, (shape, dtype) in expected.items():
        if name in ("updates", "halves", "executed") and name not in tables:
            continue
        if name not in tables or tuple(tables[name].shape) != shape or tables[name].dtype != dtype:
            raise wrong(name, f"{list(shape)} {dtype}")
    positions = tables["positions"]
    if count and (int(positions[0]) < 0 or bool((positions[1:] <= positions[:-1]).any())):
        raise wrong("positions", "increasing numbers >= 0")
    # A position is also an allocation: a damaged file must not ask for much more memory than its own length explains.
    held = 4 * batch * (layers + 1) * (int(positions[-1]) + 1) if count else 0
    if held > max(_SMALL, 16 * tables["norms"].nbytes):
        raise wrong("positions", f"numbers near the {count} rows of the file; the last is {int(positions[-1])}")
    if count and int(tables["phase"].max()) > 1:
        raise wrong("phase", "0 (prompt) or 1 (response)")
    return count, batch
