"""Local files of every format give the same items; what is wrong with one is said with its place and the next step."""

from __future__ import annotations

import json
import socket
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from void_ext.evaluate.protocol import DATASETS, DataError, load_items, local_files, sources
from void_ext.evaluate.protocol.reading import FORMATS
from void_ext.evaluate.protocol.shuffle import hashed_order

Table = Callable[[str, Sequence[dict[str, Any]]], Path]


def _rows(name: str) -> list[dict[str, Any]]:
    # The conftest's own, by value: these tests change them.
    mmlu = {"question": "q", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1}
    gpqa = {"Question": "q", "Correct Answer": "r"} | {f"Incorrect Answer {n}": f"w{n}" for n in (1, 2, 3)}
    boolq = {"question": "q", "passage": "p", "answer": True}
    return [dict({"mmlu": mmlu, "gpqa_diamond": gpqa, "boolq": boolq}[name])]


# ---- formats and places ----


@pytest.mark.parametrize("name", DATASETS)
def test_every_format_gives_the_same_items(name: str, data_dir: Path, table: Table) -> None:
    wanted = load_items(name, data_dir=data_dir)
    rows = [json.loads(line) for line in (data_dir / f"{name}.jsonl").read_text().splitlines()]
    assert len(wanted.items) == len(rows) == len({item.key for item in wanted.items})
    for suffix in FORMATS:
        place = table(f"{suffix[1:]}/{name}{suffix}", rows) / suffix[1:]
        assert load_items(name, data_dir=place).items == wanted.items, suffix


def test_the_content_of_the_items(data_dir: Path) -> None:
    mmlu = load_items("mmlu", data_dir=data_dir).items[5]
    assert mmlu.options == ("6", "None", " 5 ", "a, b")
    assert (mmlu.answer, mmlu.position, mmlu.subject) == (1, "B", "elementary_mathematics")
    gpqa = load_items("gpqa_diamond", data_dir=data_dir, order="paper").items[3]
    assert gpqa.options == ("wrong one 3", "wrong two 3", "NA", "right 3\n")
    assert (gpqa.answer, gpqa.position, gpqa.question) == (3, "D", "What is the 3-th term?\n")
    boolq = load_items("boolq", data_dir=data_dir).items[3]
    assert (boolq.options, boolq.answer, boolq.position) == (("True", "False"), 1, "False")


@pytest.mark.parametrize("name", DATASETS)
def test_the_hubs_own_layout_is_found(name: str, table: Table) -> None:
    data = DATASETS[name]
    for number, base in enumerate((data.hub_id, data.hub_id.partition("/")[2], name, ".")):
        path = Path(str(number), base, data.hub_file)
        place = table(str(path), _rows(name)) / str(number)
        assert local_files(data, place) == (place.parent / path,)
        assert len(load_items(name, data_dir=place).items) == 1


def test_shards_are_read_together_or_not_at_all(table: Table, tmp_path: Path) -> None:
    first, second = ({**_rows("boolq")[0], "question": text} for text in "xy")
    table("boolq/data/validation-00001-of-00002.parquet", [second])
    with pytest.raises(DataError, match="1 of 2 parts"):
        load_items("boolq", data_dir=tmp_path)
    table("boolq/data/validation-00000-of-00002.parquet", [first])
    assert [item.question for item in load_items("boolq", data_dir=tmp_path).items] == ["x", "y"]


def test_two_formats_of_one_data_set_are_refused(table: Table, tmp_path: Path) -> None:
    table("mmlu.csv", _rows("mmlu"))
    table("mmlu.json", _rows("mmlu"))
    with pytest.raises(DataError, match=r"mmlu\.csv and .*mmlu\.json; keep one"):
        load_items("mmlu", data_dir=tmp_path)


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    lines = [json.dumps({**_rows("mmlu")[0], "question": str(n)}) for n in range(3)]
    for count in (1, 3):
        (tmp_path / "mmlu.json").write_text("\n".join(lines[:count]))
        assert len(load_items("mmlu", data_dir=tmp_path).items) == count


@pytest.mark.parametrize(("given", "index"), [("C", 2), ("2", 2), (2, 2), ("A", 0)])
def test_mmlu_answers_as_letters_or_numbers(table: Table, given: Any, index: int) -> None:
    place = table("mmlu.jsonl", [{**_rows("mmlu")[0], "answer": given}])
    assert load_items("mmlu", data_dir=place).items[0].answer == index


# ---- nothing there ----


@pytest.mark.parametrize("name", DATASETS)
def test_an_empty_directory(name: str, tmp_path: Path) -> None:
    data = DATASETS[name]
    with pytest.raises(DataError) as caught:
        load_items(name, data_dir=tmp_path)
    for text in (str(tmp_path), data.hub_id, data.hub_file, f"{data.size:,} rows", *data.columns, "--local-dir"):
        assert text in str(caught.value)


@pytest.mark.parametrize("name", DATASETS)
def test_no_network_and_no_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def no_address(*_: object) -> None:
        raise socket.gaierror("no address")

    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    data = DATASETS[name]
    with pytest.raises(DataError) as caught:
        load_items(name)
    for text in ("cannot be reached", data.hub_id, data.hub_file, *data.columns, "--data-dir DIR"):
        assert text in str(caught.value)


def test_the_cache_of_the_hub_is_used_without_network(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    data, revision = DATASETS["boolq"], "0" * 40
    table(f"datasets--google--boolq/snapshots/{revision}/{data.hub_file}", _rows("boolq"))
    (tmp_path / "datasets--google--boolq/refs").mkdir()
    (tmp_path / "datasets--google--boolq/refs/main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "hub_out_of_reach", lambda: True)
    found = load_items("boolq")
    assert [item.question for item in found.items] == ["q"]
    assert found.files[0].name == Path(data.hub_file).name


def test_gpqa_in_its_locked_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "dataset.zip", "w") as archive:
        archive.writestr("dataset/gpqa_diamond.csv", "locked")
    with pytest.raises(DataError, match=r"dataset\.zip.*password.*README.*unzip"):
        load_items("gpqa_diamond", data_dir=tmp_path)
    with pytest.raises(DataError) as caught:
        load_items("mmlu", data_dir=tmp_path)
    assert "password" not in str(caught.value)


def test_gpqa_beside_its_archive_once_unpacked(table: Table, tmp_path: Path) -> None:
    (tmp_path / "dataset.zip").write_bytes(b"")
    table("dataset/gpqa_diamond.csv", _rows("gpqa_diamond"))
    assert len(load_items("gpqa_diamond", data_dir=tmp_path).items) == 1


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a directory\. Fetch"):
        load_items("mmlu", data_dir=tmp_path / "absent")


# ---- files that are wrong ----


@pytest.mark.parametrize("name", DATASETS)
def test_missing_columns(name: str, table: Table) -> None:
    rows = _rows(name)
    lost = DATASETS[name].columns[-1]
    rows[0]["other"] = rows[0].pop(lost)
    with pytest.raises(ValueError, match=f"missing: {lost}; found: .*other.*Fetch {DATASETS[name].hub_file}"):
        load_items(name, data_dir=table(f"{name}.jsonl", rows))


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_rows(suffix: str, table: Table) -> None:
    with pytest.raises(ValueError, match=r"holds no rows\. Fetch"):
        load_items("mmlu", data_dir=table(f"mmlu{suffix}", []))


BAD_ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "index past the options": ("mmlu", {"answer": 4}, "column answer: expected 0 to 3 or A to D.*got 4"),
    "letter past the options": ("mmlu", {"answer": "E"}, "column answer: expected 0 to 3 or A to D.*got 'E'"),
    "no answer": ("mmlu", {"answer": None}, "column answer: .*got None"),
    "a truth value": ("mmlu", {"answer": True}, "column answer: .*got True"),
    "three options": ("mmlu", {"choices": ["a", "b", "c"]}, "column choices: expected 4 texts, got"),
    "an option that is no text": ("mmlu", {"choices": ["a", "b", "c", 4]}, "column choices: expected 4 texts, got"),
    "no question": ("mmlu", {"question": " "}, "column question: expected a text, got ' '"),
    "no option": ("gpqa_diamond", {"Incorrect Answer 2": None}, "column Incorrect Answer 2: expected a text, got None"),
    "neither true nor false": ("boolq", {"answer": "perhaps"}, "column answer: expected true or false, got 'perhaps'"),
    "a number": ("boolq", {"answer": 1}, "column answer: expected true or false, got 1"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_row_that_makes_no_sense(what: str, table: Table) -> None:
    name, change, message = BAD_ROWS[what]
    rows = [*_rows(name), {**_rows(name)[0], **change}]
    with pytest.raises(ValueError, match=rf"{name}\.jsonl, row 2: {message}.*Mend the row or leave it out"):
        load_items(name, data_dir=table(f"{name}.jsonl", rows))


def test_a_column_that_a_later_row_lacks(table: Table) -> None:
    row = _rows("mmlu")[0]
    with pytest.raises(ValueError, match="row 2: has no column answer"):
        load_items("mmlu", data_dir=table("mmlu.jsonl", [row, {k: row[k] for k in row if k != "answer"}]))


def test_lists_that_a_csv_lost(tmp_path: Path) -> None:
    (tmp_path / "mmlu.csv").write_text("question,subject,choices,answer\nq,s,['a' 'b' 'c' 'd'],1\n")
    with pytest.raises(ValueError, match=r"expected a JSON array in a csv field.*parquet or jsonl"):
        load_items("mmlu", data_dir=tmp_path)


DAMAGED = {
    "mmlu.parquet": (b"PAR1 not really", "not a parquet file"),
    "mmlu.jsonl": (b'{"question": 1}\n{"question"', "line 2: expected one JSON object a line"),
    "mmlu.json": (b'[{"question": ', "line 1: not JSON"),
    "boolq.json": (b'{"question": {"0": "q"}}', r"orient='records'"),
    "gpqa_diamond.json": (b"[1]", "row 1: expected an object"),
    "mmlu.csv": (b"question,subject,choices,answer\nq,s\n", "row 1: has not as many fields"),
    "boolq.csv": (b'question,passage,answer\n"q,p,True\n', "not a csv file, or a damaged one"),
    "boolq.jsonl": (b"\xff\xfe", "expected UTF-8 text, byte 0"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file(name: str, tmp_path: Path) -> None:
    data, message = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_items(name.partition(".")[0], data_dir=tmp_path)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data set: expected one of mmlu, gpqa_diamond, boolq, got 'arc'"):
        load_items("arc")
    with pytest.raises(ValueError, match="order: expected one of hash, paper, got 'random'"):
        load_items("mmlu", order="random")


# ---- copies ----


def test_copies_are_kept_and_told_or_left_out(table: Table) -> None:
    row = _rows("mmlu")[0]
    place = table("mmlu.jsonl", [row, {**row, "question": "other"}, row, {**row, "answer": 2}])
    kept = load_items("mmlu", data_dir=place)
    assert len(kept.items) == len({item.key for item in kept.items}) == 4
    assert kept.items[3].key == f"{kept.items[0].key}#3"
    assert (
        "2 of 4 rows are copies of earlier ones (row 3 of row 1), 1 of them with another right answer" in kept.notes[0]
    )
    assert "--drop-duplicates" in kept.notes[0]
    assert [item.question for item in load_items("mmlu", data_dir=place, drop_duplicates=True).items] == ["q", "other"]


def test_equal_options_and_another_number_of_rows_are_told(table: Table) -> None:
    notes = load_items("mmlu", data_dir=table("mmlu.jsonl", [{**_rows("mmlu")[0], "choices": list("aabc")}])).notes
    assert notes[0] == "mmlu: 1 of 1 items show the same text under two letters; one counts"
    assert notes[1] == "mmlu: 1 rows; the published split has 14,042"


# ---- the order of options ----


def test_the_order_hangs_on_the_item_alone(data_dir: Path, table: Table) -> None:
    items = load_items("gpqa_diamond", data_dir=data_dir).items
    rows = [json.loads(line) for line in (data_dir / "gpqa_diamond.jsonl").read_text().splitlines()]
    some = load_items("gpqa_diamond", data_dir=table("part/gpqa_diamond.jsonl", rows[:6:-1]) / "part").items
    assert list(some) == list(items[:6:-1])
    for item, row in zip(items, rows, strict=True):
        assert item.options[item.answer] == row["Correct Answer"]
        assert sorted(item.options) == sorted(value for name, value in row.items() if "Answer" in name)


def test_known_orders() -> None:
    # A change here makes runs incomparable with earlier ones.
    assert [hashed_order(key, 4) for key in "abc"] == [(3, 0, 2, 1), (0, 3, 2, 1), (3, 2, 0, 1)]


def test_right_answers_are_spread_evenly() -> None:
    places = Counter(hashed_order(f"item {n}", 4).index(3) for n in range(8000))
    # 2,000 each; six standard deviations are 232.
    assert all(abs(count - 2000) < 232 for count in places.values()), places
    assert len({hashed_order(f"item {n}", 4) for n in range(1000)}) == 24


def test_the_papers_order_puts_the_right_answer_last(data_dir: Path) -> None:
    items = load_items("gpqa_diamond", data_dir=data_dir, order="paper").items
    assert {item.position for item in items} == {"D"}
    assert items != load_items("gpqa_diamond", data_dir=data_dir).items
