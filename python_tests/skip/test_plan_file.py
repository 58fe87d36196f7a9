"""Plans on disk: what is saved comes back, nothing is overwritten, and no other file passes for one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from void_ext import PhasePlan, VoidPlan, _plan_file
from void_ext.plan import Action, Fingerprint, Weights

FINGERPRINT = Fingerprint("llama", 3, 32, 64, 4, 2, 8, 96, "0" * 64, False, Weights((7,) * 3, (2,) * 3, (9,) * 3, 11))


def example() -> VoidPlan:
    S, P, R = Action
    prompt = PhasePlan([R, P, S], [R, S, S])
    return VoidPlan(prompt, PhasePlan([[R, R, S], [R, P, S]], [[R, R, S], [R, S, R]]), FINGERPRINT, "by hand: ‖h‖")


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "plan.json"
    data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content))
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def refused(path: Path) -> str:
    """The message with which ``path`` is refused, behind the path."""
    head = f"path: {path} is not a plan of void_ext: "
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the message
        VoidPlan.load(path)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message.startswith(head)
    assert len(message) - len(head) < 300, "an error that prints the file"
    return message.removeprefix(head)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    for number, plan in enumerate((example(), VoidPlan.dense(1), VoidPlan.from_layers(4, skip=[2], phase="prompt"))):
        path = plan.save(tmp_path / f"{number}.json")
        again = VoidPlan.load(str(path))
        assert again == plan
        assert again.source == plan.source
        assert hash(again) == hash(plan)
        assert VoidPlan.from_dict(plan.to_dict()) == plan
        assert VoidPlan.from_dict(json.loads(path.read_text())) == plan
        assert json.loads(path.read_text()) == plan.to_dict()


def test_a_file_can_be_read_and_edited_by_people(tmp_path: Path) -> None:
    path = VoidPlan.from_layers(3, attention=[1], phase="prompt").save(tmp_path / "plan.json")
    assert path.read_text().splitlines() == [
        "{",
        '  "format": "void_ext.plan",',
        '  "version": 1,',
        """  "source": "from_layers(skip=[], attention=[1], mlp=[], phase='prompt')",""",
        '  "layers": 3,',
        '  "prompt": {"attention": ["run", "project", "run"], "mlp": ["run", "run", "run"]},',
        '  "response": {"attention": ["run", "run", "run"], "mlp": ["run", "run", "run"]},',
        '  "fingerprint": null',
        "}",
    ]


tables = st.lists(st.sampled_from([Action.PROJECT, Action.RUN]), min_size=3, max_size=3)


@given(
    prompt=tables,
    response=tables,
    mlp=st.lists(st.sampled_from([0, 2]), min_size=3, max_size=3),
    source=st.text(max_size=50).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)),
)
def test_any_plan_comes_back(
    tmp_path_factory: pytest.TempPathFactory, prompt: Any, response: Any, mlp: Any, source: str
) -> None:
    plan = VoidPlan(PhasePlan(prompt, mlp), PhasePlan([response] * 2, [mlp] * 2), FINGERPRINT, source)
    again = VoidPlan.load(plan.save(tmp_path_factory.mktemp("plans") / "plan.json"))
    assert (again, again.source) == (plan, source)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="exists already"):
        example().save(path)
    assert path.read_text() == "precious"
    example().save(path, force=True)
    assert VoidPlan.load(path) == example()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        example().save(tmp_path / "missing" / "plan.json")
    assert sorted(tmp_path.iterdir()) == [path]


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = PhasePlan.dense(3)
    with pytest.raises(ValueError, match=r"expected at most .* 10000 characters of source"):
        VoidPlan(dense, dense, None, "x" * 10_001).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"source: expected text, got half of a surrogate pair in 'caf\\udce9\.txt'"):
        VoidPlan(dense, dense, None, "caf\udce9.txt")
    monkeypatch.setattr(_plan_file, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="expected at most 100 bytes of JSON"):
        example().save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_there_is_room_for_large_batches(tmp_path: Path) -> None:
    rows = [[Action.PROJECT] * 100] * 1000
    mlp = [[Action.SKIP] * 100] * 1000
    plan = VoidPlan(PhasePlan.dense(100), PhasePlan(rows, mlp))
    assert VoidPlan.load(plan.save(tmp_path / "plan.json")) == plan


# ---- files that are not plans ----


def test_places_without_a_file(tmp_path: Path) -> None:
    for missing in (tmp_path / "missing.json", tmp_path, Path(os.devnull)):
        with pytest.raises(FileNotFoundError, match="path: no plan file at"):
            VoidPlan.load(missing)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON: Expecting value"),
        (b"{", "expected JSON: "),
        (b"null", "expected an object with the entry 'format': 'void_ext.plan', got None"),
        (b"[]", "expected an object .*, got a list"),
        (b"{}", "expected an object .*, got a dict"),
        (b'{"format": "void_ext.trace"}', "expected an object"),
        (b"\x80\x04\x95 pickle, say", "expected UTF-8, got byte 0x80 at 0"),
        ("{}".encode("utf-16"), "expected UTF-8, got byte 0xff at 0"),
        (b"\xef\xbb\xbf{}", "expected JSON: "),
        (b'{"version": NaN}', "expected JSON, got the number NaN"),
        (b'{"version": -Infinity}', "expected JSON, got the number -Infinity"),
        (b'{"version": 1, "version": 1}', "entry 'version': expected once, got it twice"),
        (b'{"version": 1, "\\u0076ersion": 2}', "entry 'version': expected once, got it twice"),
        (b'{"version": ' + b"9" * 5000 + b"}", "expected numbers of at most 18 digits, got one of 5000"),
        (b"[" * 100_000, "expected at most 8 levels of nesting"),
        (b'{"a":' * 100_000, "expected at most 8 levels of nesting"),
        (b'"\\\\"' + b"[" * 100_000, "expected at most 8 levels of nesting"),
        (b'{"a": "\\"' + b"[" * 1000 + b'"}', "expected an object"),
        (b'"' * 100_001, "expected JSON: "),
        (b'\\"' * 100_000, "expected JSON: "),
        (b"{} {}", "expected JSON: Extra data"),
        (b"__import__('os').abort()", "expected JSON: "),
    ],
)
def test_no_json_or_not_ours(content: bytes, message: str, tmp_path: Path) -> None:
    assert re.match(message, refused(written(tmp_path, content)))


def test_large_files_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, b" " * (_plan_file.MAX_BYTES + 1))
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    assert refused(path) == f"expected at most {_plan_file.MAX_BYTES} bytes"


def test_recursion_that_gets_past_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan_file, "_check_depth", lambda text: None)
    assert "nesting" in refused(written(tmp_path, b"[" * 1_000_000))


def put(path: str, value: Any) -> Any:
    """A change of one entry of a plan's dictionary; REMOVED takes it out."""

    def change(plan: dict[str, Any]) -> None:
        *way, last = (int(part) if part.isdigit() else part for part in path.split("."))
        inner: Any = plan
        for part in way:
            inner = inner[part]
        if value is REMOVED:
            del inner[last]
        else:
            inner[last] = value

    return change


REMOVED = object()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", 3), "expected an object with the entry 'format'"),
        (put("version", 2), "entry 'version': this void_ext reads plans of version 1, got 2"),
        (put("version", True), "entry 'version': this void_ext reads plans of version 1, got True"),
        (put("version", "1"), "entry 'version': this void_ext reads plans of version 1, got '1'"),
        (put("version", 1.0), "entry 'version': this void_ext reads plans of version 1, got 1.0"),
        (put("version", REMOVED), "entry 'version': this void_ext reads plans of version 1, got None"),
        (put("source", REMOVED), "entry 'source': expected, but missing"),
        (put("source", 3), "entry 'source': expected text of at most 10000 characters, got 3"),
        (put("source", "x" * 10_001), "entry 'source': expected text of at most 10000 characters, got 'xxx"),
        (put("source", "\ud800"), "entry 'source': expected text, got half of a surrogate pair"),
        (put("extra", 1), "entry 'extra': unknown; the entries are format, version, source, layers, prompt"),
        (put("x" * 100_000, 1), "entry 'xxxx"),
        (put("layers", 0), "entry 'layers': expected a whole number >= 1, got 0"),
        (put("layers", 4), "entry 'prompt.attention': expected a list of 4 actions, got 3"),
        (put("layers", 10**17), "entry 'prompt.attention': expected a list of 1000"),
        (put("layers", 3.0), "entry 'layers': expected a whole number >= 1, got 3.0"),
        (put("layers", None), "entry 'layers': expected a whole number >= 1, got None"),
        (put("prompt", []), "entry 'prompt': expected an object, got a list"),
        (put("prompt.mlp", REMOVED), "entry 'prompt.mlp': expected, but missing"),
        (put("prompt.norm", 1), "entry 'prompt.norm': unknown; the entries are attention, mlp"),
        (put("prompt.attention", "run"), "entry 'prompt.attention': expected a list of actions, got 'run'"),
        (put("prompt.attention", {}), "entry 'prompt.attention': expected a list of actions, got a dict"),
        (put("prompt.attention", []), "entry 'prompt.attention': expected a list of actions, got a list"),
        (put("prompt.attention", [[]]), r"entry 'prompt.attention\[0\]': expected a list of 3 actions, got 0"),
        (put("prompt.attention.1", "walk"), r"entry 'prompt.attention\[1\]': expected one of skip, project, run, got"),
        (put("prompt.attention.1", "RUN"), r"entry 'prompt.attention\[1\]': expected one of .*, got 'RUN'"),
        (put("prompt.attention.1", 2), r"entry 'prompt.attention\[1\]': expected one of .*, got 2"),
        (put("prompt.attention.1", ["run"]), r"entry 'prompt.attention\[1\]': expected one of .*, got a list"),
        (put("prompt.attention.0", ["run"] * 3), r"entry 'prompt.attention\[1\]': expected a list of 3 .*, got 'pro"),
        (put("prompt.mlp.1", "project"), r"entry 'prompt': mlp\[1\]: expected one of SKIP, RUN, got"),
        (put("response.mlp", ["run"] * 3), r"entry 'response': mlp: expected the shape of attention, \[2, 3\], got"),
        (put("response.attention.1.2", "run"), "prompt: layer 2 of row 1 SKIPs its attention, a hole in the cache"),
        (put("fingerprint", 3), "entry 'fingerprint': expected an object, got 3"),
        (put("fingerprint.heads", REMOVED), "entry 'fingerprint.heads': expected, but missing"),
        (put("fingerprint.heads", -1), "entry 'fingerprint.heads': expected a whole number >= 0, got -1"),
        (put("fingerprint.heads", True), "entry 'fingerprint.heads': expected a whole number >= 0, got True"),
        (put("fingerprint.layers", 4), "fingerprint: expected a model of 3 layers, got 4"),
        (put("fingerprint.model_type", None), "entry 'fingerprint.model_type': expected text"),
        (put("fingerprint.norms", "0" * 63), "entry 'fingerprint.norms': expected 64 hexadecimal digits or ''"),
        (put("fingerprint.norms", "g" * 64), "entry 'fingerprint.norms': expected 64 hexadecimal digits"),
        (put("fingerprint.norms", "0" * 64 + "\n"), "entry 'fingerprint.norms': expected 64 hexadecimal digits"),
        (put("fingerprint.quantised", 0), "entry 'fingerprint.quantised': expected true or false, got 0"),
        (put("fingerprint.weights", None), "entry 'fingerprint.weights': expected an object, got None"),
        (put("fingerprint.weights.mlp", [1, 2]), "entry 'fingerprint.weights.mlp': expected a list of 3 numbers"),
        (put("fingerprint.weights.mlp.0", 0.5), r"entry 'fingerprint.weights.mlp\[0\]': expected a whole number >= 0"),
        (put("fingerprint.weights.other", "1"), "entry 'fingerprint.weights.other': expected a whole number >= 0"),
    ],
)
def test_damaged_plans(change: Any, message: str, tmp_path: Path) -> None:
    plan = example().to_dict()
    change(plan)
    with pytest.raises(ValueError, match=message):
        VoidPlan.from_dict(plan)
    assert re.match(message, refused(written(tmp_path, json.dumps(plan))))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=5) | st.just("run"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.data())
def test_any_value_in_any_place_is_a_value_error_or_a_plan(data: st.DataObject) -> None:
    plan = example().to_dict()
    places = ["layers", "prompt", "response", "fingerprint", "source", "version", "prompt.attention", "response.mlp"]
    places += ["response.attention.1", "prompt.mlp.0", "fingerprint.weights", "fingerprint.weights.project"]
    put(data.draw(st.sampled_from(places)), data.draw(anything))(plan)
    try:
        found = VoidPlan.from_dict(plan)
    except ValueError:
        return
    assert VoidPlan.from_dict(found.to_dict()) == found


@settings(max_examples=200)
@given(st.binary(max_size=200), st.integers(0, 2000), st.integers(0, 50))
def test_bytes_changed_anywhere_are_a_value_error_or_a_plan(noise: bytes, start: int, length: int) -> None:
    data = json.dumps(example().to_dict()).encode()
    damaged = data[:start] + noise + data[start + length :]
    with contextlib.suppress(ValueError):
        VoidPlan.from_dict(_plan_file._parse(damaged))
