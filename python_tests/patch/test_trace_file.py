"""Traces on disk: what is saved comes back, nothing is overwritten, and no other file passes for one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import void_ext


@pytest.fixture
def trace(tiny: Any, padded_batch: Any) -> void_ext.Trace:
    model = tiny("llama")
    ids, mask = padded_batch
    with void_ext.patch(model, alpha=0.4, updates=True, halves=True) as handle:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=[2, 30, 60])
    assert handle.trace is not None
    return handle.trace


def test_what_is_saved_comes_back(trace: void_ext.Trace, tmp_path: Path) -> None:
    path = trace.save(tmp_path / "a.safetensors")
    again = void_ext.Trace.load(path)
    assert repr(again) == repr(trace)
    assert again.info == trace.info
    for phase in ("prompt", "response"):
        ours, theirs = getattr(again, phase), getattr(trace, phase)
        assert ours.positions == theirs.positions
        for name in ("norms", "tokens", "mask", "updates", "halves", "executed"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for alpha in (None, 0.0, 0.8):
            assert torch.equal(ours.active(alpha), theirs.active(alpha))
    assert json.loads(json.dumps(again.to_dict())) == json.loads(json.dumps(trace.to_dict()))


def test_what_is_no_path_is_named(trace: void_ext.Trace) -> None:
    for use in (void_ext.Trace.load, trace.save, void_ext.VoidPlan.load, void_ext.VoidPlan.from_layers(4).save):
        with pytest.raises(TypeError, match=r"path: expected the name of a file \(str or os\.PathLike\), got int 5"):
            use(5)


def test_a_dictionary_holds_what_json_knows(tiny: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model, updates=True) as handle, torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
        model(torch.tensor([[3, 4]]))
    trace = handle.trace
    assert trace is not None
    found = json.loads(json.dumps(trace.to_dict(), allow_nan=False))["prompt"]
    for name in ("norms", "updates"):
        table = getattr(trace.prompt, name)
        assert not bool(table.isfinite().all())
        expected = [[[n if math.isfinite(n) else None for n in row] for row in rows] for rows in table.tolist()]
        assert found[name] == expected
    assert found["active"] == trace.prompt.active().tolist()


def test_tokens_can_be_left_out(trace: void_ext.Trace, tmp_path: Path) -> None:
    again = void_ext.Trace.load(trace.save(tmp_path / "a.safetensors", tokens=False))
    assert bool((again.prompt.tokens == -1).all())
    assert bool((again.response.tokens == -1).all())
    assert torch.equal(again.response.mask, trace.response.mask)
    assert torch.equal(again.response.usage(), trace.response.usage())


def test_granularity_and_quirks_survive(tiny: Any, padded_batch: Any, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    ids, mask = padded_batch
    for number, options in enumerate(
        ({"granularity": "sequence"}, {"granularity": "batch"}, {"reference_quirks": True})
    ):
        with void_ext.patch(model, **options) as handle:
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        assert handle.trace is not None
        again = void_ext.Trace.load(handle.trace.save(tmp_path / f"{number}.safetensors"))
        assert torch.equal(again.prompt.active(), handle.trace.prompt.active())
        assert torch.equal(again.response.usage(), handle.trace.response.usage())


def test_nothing_is_overwritten(trace: void_ext.Trace, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="exists already"):
        trace.save(path)
    assert path.read_text() == "precious"
    trace.save(path, force=True)
    void_ext.Trace.load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        trace.save(tmp_path / "missing" / "a.safetensors")
    assert sorted(tmp_path.iterdir()) == [path]


def rewrite(path: Path, change: Any) -> None:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["void_ext"])
    tables = load_file(path)
    change(header, tables)
    save_file(tables, path, metadata={"void_ext": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, tables: header.update(version=99), "trace version 99; this void_ext reads 1"),
        (lambda header, tables: header.update(format="other"), "is not a void_ext trace"),
        (lambda header, tables: header.update(layers="six"), "'layers': expected int, got 'six'"),
        (lambda header, tables: header.update(layers=7), r"table 'norms': expected \[3, \d+, 8\]"),
        (lambda header, tables: header.update(alpha=-1.0), "alpha: expected a finite number"),
        (lambda header, tables: header.update(granularity="layer"), "granularity: expected one of"),
        (lambda header, tables: header.pop("mode"), "'mode': expected str, got None"),
        (lambda header, tables: tables.pop("mask"), r"table 'mask': expected \[B, T\], got nothing"),
        (
            lambda header, tables: tables.update(norms=tables["norms"].double()),
            "table 'norms': expected .*float32, got",
        ),
        (lambda header, tables: tables.update(tokens=tables["tokens"][:, 1:].contiguous()), "table 'tokens': expected"),
        (lambda header, tables: tables["positions"].fill_(3), "table 'positions': expected increasing"),
        (
            lambda header, tables: tables["positions"].add_(1 << 40),
            "table 'positions': expected numbers near the",
        ),
        (lambda header, tables: tables["phase"].fill_(9), "table 'phase': expected 0"),
    ],
)
def test_damaged_files(change: Any, message: str, trace: void_ext.Trace, tmp_path: Path) -> None:
    path = trace.save(tmp_path / "a.safetensors")
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        void_ext.Trace.load(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no trace file at"):
        void_ext.Trace.load(tmp_path / "missing.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="is not a void_ext trace"):
        void_ext.Trace.load(other)
    other.write_bytes(b"\x80\x04 pickle, say")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        void_ext.Trace.load(other)
    deep = "[" * 100_000
    save_file({"x": torch.zeros(2)}, other, metadata={"void_ext": deep})
    with pytest.raises(ValueError, match="is not a void_ext trace"):
        void_ext.Trace.load(other)
