"""Runs: what is compared, what is kept, how an interrupted one goes on, and what is refused before it begins."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import void_ext
from void_ext import _files
from void_ext.evaluate import CellStore, ModeSpec, Report, Settings, TaskRun, run

pytest.importorskip("lm_eval")

OTHER = void_ext.VoidPlan.from_layers(12, skip=[3])
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}


@pytest.fixture
def modes() -> list[ModeSpec]:
    plan = void_ext.VoidPlan.from_layers(6, skip=[2], attention=[4])
    return [ModeSpec.dense(), ModeSpec.exit(0.4), ModeSpec.skip(plan=plan)]


def results(report: Report) -> Any:
    """Everything but how long it took."""
    document = report.to_dict()
    for row in (*document["usage"], *document["cells"]):
        del row["seconds"]
    return document, [cell.items for cell in report.cells]


def test_every_mode_sees_the_same_documents(
    tiny: Any, tokenizer: Any, load: Callable[..., Any], modes: list[ModeSpec]
) -> None:
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = run(model, tokenizer, load("choices", "telling"), modes, Settings(limit=5))
    assert [cell.key for cell in report.cells] == [
        (task, mode.label, 0) for task in ("choices", "telling") for mode in modes
    ]
    for cell in report.cells:
        assert [item.doc_id for item in cell.items] == list(range(5))
    assert not any("_void_ext_handle" in module.__dict__ for module in model.modules())
    assert all(bool((value == before[name]).all()) for name, value in model.state_dict().items())
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["format"] == "void_ext.evaluation.results"


def test_layers_computed_are_those_of_the_plan(
    tiny: Any, tokenizer: Any, load: Callable[..., Any], modes: list[ModeSpec]
) -> None:
    report = run(tiny("llama"), tokenizer, load("choices", "writing"), modes)
    for row in report.usage:
        assert row.computed == (4.5 if row.mode == "skip" else 6)
    skipped = [cell for cell in report.cells if cell.mode == "skip"]
    for cell in skipped:
        assert cell.counters is not None
        for name, usage in cell.usage.items():
            executed = [usage.tokens] * 6
            executed[2] = 0
            assert usage.executed == executed
            assert usage.active["0.8"][2] == 0
            assert cell.counters[name]["layers_skipped"] == cell.counters[name]["calls"]


def test_usage_is_that_of_a_trace(tiny: Any, tokenizer: Any, load: Callable[..., Any]) -> None:
    """Batches of one: pooled by hand over plain calls of a patched model."""
    import torch

    model, tasks = tiny("llama"), load("telling")
    report = run(model, tokenizer, tasks, [ModeSpec.dense(0.4)], Settings(batch_size=1, alpha=0.4))
    active, tokens = torch.zeros(6), 0
    with void_ext.patch(model, alpha=0.4) as handle, torch.no_grad():
        for document in tasks["telling"].task.eval_docs:
            ids = [tokenizer.bos_token_id, *tokenizer.encode(document["text"])][:-1]
            model(torch.tensor([ids]))
            assert handle.trace is not None
            active += handle.trace.prompt.usage() * len(ids)
            tokens += len(ids)
    usage = report.cells[0].usage["prompt"]
    assert usage.tokens == tokens
    assert usage.active["0.4"] == pytest.approx(active.tolist())
    assert usage.usage(0.4) == pytest.approx((active / tokens).tolist())


def test_seeds_are_runs_of_their_own_and_come_again(tiny: Any, tokenizer: Any, load: Callable[..., Any]) -> None:
    task = load("writing")["writing"].task
    entries = {
        "sampled": TaskRun(task, SAMPLED, seeds=(0, 1)),
        "greedy": TaskRun(task, {"do_sample": False}, seeds=(0,)),
    }
    before = dict(task.get_config("generation_kwargs"))
    first = run(tiny("llama"), tokenizer, entries, [ModeSpec.dense(), ModeSpec.exit(0.2)])
    again = run(tiny("llama"), tokenizer, entries, [ModeSpec.dense(), ModeSpec.exit(0.2)])
    assert results(first) == results(again)
    assert task.get_config("generation_kwargs") == before
    answers = {cell.key: [item.answers for item in cell.items] for cell in first.cells}
    assert answers["sampled", "dense", 0] != answers["sampled", "dense", 1]
    assert answers["sampled", "dense", 0] != answers["greedy", "dense", 0]
    rows = [row for row in first.scores if row.task == "sampled" and row.mode == "dense"]
    assert [row.seed for row in rows] == [0, 1, None]
    assert [row.score.interval for row in rows] == ["wilson"] * 3  # all runs agree
    assert first.score("greedy", "dense", "exact_match").seed == 0


def test_a_group_pools_the_documents_of_its_tasks(tiny: Any, tokenizer: Any, load: Callable[..., Any]) -> None:
    first, second = load("choices")["choices"].task, load("choices")["choices"].task
    entries = {"one": TaskRun(first, group="both"), "two": TaskRun(second, group="both")}
    report = run(tiny("llama"), tokenizer, entries, [ModeSpec.dense(), ModeSpec.exit(0.2)])
    one, both = report.score("one", "dense", "acc"), report.score("both", "dense", "acc")
    assert both.documents == 2 * one.documents == 24
    assert both.score.value == one.score.value
    assert both.score.stderr == pytest.approx(one.score.stderr * (11 / 23) ** 0.5)
    usage = {(row.task, row.mode): row for row in report.usage}
    assert usage["both", "dense"].tokens["prompt"] == 2 * usage["one", "dense"].tokens["prompt"]


# ---- going on ----


class StoppedError(Exception):
    pass


def interrupt_at(what: str) -> Callable[[str, int, int], None]:
    def progress(said: str, done: int, total: int) -> None:
        if said == what and done:
            raise StoppedError

    return progress


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, tiny: Any, tokenizer: Any, load: Callable[..., Any], modes: list[ModeSpec]
) -> None:
    settings = Settings(batch_size=3, seeds=(0, 1))
    tasks = {"choices": load("choices")["choices"], "writing": TaskRun(load("writing")["writing"].task, SAMPLED)}
    whole = run(tiny("llama"), tokenizer, tasks, modes, settings)
    with pytest.raises(StoppedError):
        run(
            tiny("llama"), tokenizer, tasks, modes, settings,
            directory=tmp_path / "out", progress=interrupt_at("writing · exit α=0.4 · seed 0"),
        )  # fmt: skip
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 7
    said: list[str] = []
    resumed = run(
        tiny("llama"), tokenizer, tasks, modes, settings,
        directory=tmp_path / "out", progress=lambda what, *_: said.append(what),
    )  # fmt: skip
    assert not any(what.startswith("choices") or "dense · seed 0" in what for what in said)
    assert results(resumed) == results(whole)
    # All of it is there now: nothing is run, not even patched.
    third = run(tiny("llama"), tokenizer, tasks, modes, settings, directory=tmp_path / "out")
    assert [cell.seconds for cell in third.cells] == [cell.seconds for cell in resumed.cells]


def test_a_run_of_another_configuration_is_refused_and_kept(
    tmp_path: Path, tiny: Any, tokenizer: Any, load: Callable[..., Any]
) -> None:
    place = tmp_path / "out"
    run(tiny("llama"), tokenizer, load("telling"), [ModeSpec.dense()], directory=place)
    kept = sorted(path.read_bytes() for path in place.rglob("*.json"))
    with pytest.raises(ValueError, match=r"another configuration \(.*settings.limit: none there, 3 here") as caught:
        run(tiny("llama"), tokenizer, load("telling"), [ModeSpec.dense()], Settings(limit=3), directory=place)
    assert "--force" in str(caught.value)
    other = tiny("llama")
    other.model.norm.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match=r"model.fingerprint.norms"):
        run(other, tokenizer, load("telling"), [ModeSpec.dense()], directory=place)
    with pytest.raises(ValueError, match=r"modes: ") as caught:
        run(tiny("llama"), tokenizer, load("telling"), [ModeSpec.dense(), ModeSpec.exit(0.3)], directory=place)
    assert "modes: dense there, dense, exit α=0.3 here" in str(caught.value)
    assert sorted(path.read_bytes() for path in place.rglob("*.json")) == kept
    (place / "mine.txt").write_text("stays")
    run(
        tiny("llama"),
        tokenizer,
        load("telling"),
        [ModeSpec.dense()],
        Settings(limit=3),
        directory=CellStore(place, force=True),
    )
    assert (place / "mine.txt").read_text() == "stays"
    assert len(json.loads(next((place / "cells").iterdir()).read_text())["items"]) == 3


def test_a_damaged_cell_is_named(tmp_path: Path, tiny: Any, tokenizer: Any, load: Callable[..., Any]) -> None:
    run(tiny("llama"), tokenizer, load("telling"), [ModeSpec.dense()], directory=tmp_path / "out")
    cell = next((tmp_path / "out" / "cells").iterdir())
    cell.write_text(cell.read_text()[:-20])
    with pytest.raises(ValueError, match=r"is damaged .* delete it and it is run again"):
        run(tiny("llama"), tokenizer, load("telling"), [ModeSpec.dense()], directory=tmp_path / "out")


@pytest.mark.parametrize(
    "content", ["", '{"format": "void_ext.eval', '{"format": "void_ext.evaluation", "version": 99}']
)
def test_a_damaged_run_can_be_thrown_away(
    tmp_path: Path, tiny: Any, tokenizer: Any, load: Callable[..., Any], content: str
) -> None:
    place, modes = tmp_path / "out", [ModeSpec.dense()]
    run(tiny("llama"), tokenizer, load("telling"), modes, directory=place)
    (place / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is no.*; take another directory, or pass force \(--force\)"):
        CellStore(place)
    run(tiny("llama"), tokenizer, load("telling"), modes, directory=CellStore(place, force=True))
    assert json.loads((place / "run.json").read_text())["version"] == 1


def test_what_is_another_programs_is_not_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"epochs": 3}')
    with pytest.raises(ValueError, match="is no run of void_ext's; take another directory"):
        CellStore(tmp_path, force=True)


def test_a_full_disk_keeps_what_was_finished(
    tmp_path: Path, tiny: Any, tokenizer: Any, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, modes = tiny("llama"), [ModeSpec.dense(), ModeSpec.exit(0.3), ModeSpec.exit(0.6)]
    written, sync = [], _files.sync

    def full(path: Path) -> None:
        if path.is_file() and path.parent.name == "cells":
            written.append(path)
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(_files, "sync", full)
    with pytest.raises(OSError, match=r"No space left on device.*make room, then run the same command again"):
        run(model, tokenizer, load("telling"), modes, directory=tmp_path / "out")
    assert [path.suffix for path in (tmp_path / "out" / "cells").iterdir()] == [".json"]
    monkeypatch.undo()
    report = run(model, tokenizer, load("telling"), modes, directory=tmp_path / "out")
    assert results(report) == results(run(model, tokenizer, load("telling"), modes))


def test_room_is_made_without_throwing_away_what_was_finished(
    tmp_path: Path, tiny: Any, tokenizer: Any, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        if path.parent.name == "cells":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files, "sync", full)
    store = CellStore(tmp_path / "out", force=True)
    message = r"the same command again without force \(--force\), and it goes on from what"
    with pytest.raises(OSError, match=message) as caught:
        run(tiny("llama"), tokenizer, load("telling"), [ModeSpec.dense()], directory=store)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [
        ("missing/out", FileNotFoundError, "does not exist"),
        ("file", NotADirectoryError, "is a file"),
        ("other", ValueError, "holds files and no run.json"),
        ("/proc/void-eval", PermissionError, "not writable"),
    ],
)
def test_places_that_cannot_be_written(tmp_path: Path, place: str, kind: type[Exception], message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(kind, match=message):
        CellStore(tmp_path / place)


# ---- refused ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modes": []}, "expected a dense one, .* got none"),
        ({"modes": [ModeSpec.exit()]}, "expected a dense one"),
        ({"modes": [ModeSpec.dense(), ModeSpec.exit(0.3), ModeSpec.exit(0.3)]}, "exit α=0.3 more than once"),
        ({"tasks": {}}, "tasks: expected at least one"),
        ({"chat": True}, "this tokenizer has no chat template"),
        ({"modes": [ModeSpec.dense(), ModeSpec.skip(plan=OTHER)]}, "12 layers, got 6"),
    ],
)
def test_what_cannot_run_is_refused_first(
    change: dict[str, Any], message: str, tiny: Any, tokenizer: Any, load: Callable[..., Any]
) -> None:
    def never(what: str, *_: int) -> None:
        pytest.fail(f"began: {what}")

    settings = Settings(apply_chat_template=change.get("chat", False))
    tasks, modes = change.get("tasks", load("telling")), change.get("modes", [ModeSpec.dense()])
    with pytest.raises(ValueError, match=message):
        run(tiny("llama"), tokenizer, tasks, modes, settings, progress=never)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, 'batch_size: expected "auto" or a whole number >= 1, got 0'),
        ({"limit": 1.5}, "limit: expected a whole number >= 1 or a share between 0 and 1, got 1.5"),
        ({"limit": math.inf}, "limit: expected a whole number >= 1 or a share between 0 and 1, got inf"),
        ({"limit": True}, "limit: expected a whole number >= 1 or a share between 0 and 1, got True"),
        ({"limit": "5"}, "limit: expected a whole number >= 1 or a share between 0 and 1, got '5'"),
        ({"seeds": ()}, "seeds: expected different whole numbers"),
        ({"seeds": (1, 1)}, "seeds: expected different whole numbers"),
        ({"seeds": (0.5,)}, r"seeds: expected different whole numbers from 0 to .*, got \[0.5\]"),
        ({"seeds": (True,)}, r"seeds: expected different whole numbers from 0 to .*, got \[True\]"),
        ({"seeds": ("1",)}, r"seeds: expected different whole numbers from 0 to .*, got \['1'\]"),
        ({"alpha": -1.0}, "alpha: expected a finite number"),
        ({"num_fewshot": -1}, "num_fewshot: expected"),
        ({"num_fewshot": 1.5}, "num_fewshot: expected a whole number >= 0, or None, got 1.5"),
        ({"num_fewshot": True}, "num_fewshot: expected a whole number >= 0, or None, got True"),
        ({"confidence": 1.0}, "confidence: expected"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**given)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tiny: Any, tokenizer: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "void-ext\[eval\]"'):
        run(tiny("llama"), tokenizer, {"a": object()}, [ModeSpec.dense()])
