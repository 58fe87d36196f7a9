"""Rows of a local table. Files are data: parquet through pyarrow, csv and json through the standard library.

pandas is not used for csv and json: it takes the option "None" for a missing value and "01" for the number 1.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FORMATS = (".parquet", ".jsonl", ".json", ".csv")


def read_rows(path: Path) -> list[Row]:
    """All rows of a ``.parquet``, ``.jsonl``, ``.json`` (an array of objects, or one object a line) or ``.csv`` file.

    Raises:
        ValueError: the file is not what its name says; the message names the place and what to do.
        ModuleNotFoundError: a parquet file, and no pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # line breaks inside a question stay as they are
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, byte {error.start} is not; save it as UTF-8") from None
    if suffix == ".csv":
        return _csv(path, text)
    if suffix == ".jsonl":
        return _json_lines(path, text)
    if suffix == ".json":
        return _json(path, text)
    raise ValueError(f"{path}: expected a file that ends in one of {', '.join(FORMATS)}")


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: parquet files need the package pyarrow: pip install pyarrow", name="pyarrow"
        ) from None
    try:
        # The file object: pyarrow takes names such as "a=1/x.parquet" apart, and would add columns.
        with path.open("rb") as file:
            rows: list[Row] = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file, or a damaged one ({error}); fetch it again") from None
    return rows


def _csv(path: Path, text: str) -> list[Row]:
    limit = csv.field_size_limit(max(len(text), 1 << 17))  # a passage may be longer than the module's 128 KiB
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows: list[Row] = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}: not a csv file, or a damaged one (line {reader.line_num}: {error})") from None
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, row {number}: has not as many fields as the header (it ends at line {reader.line_num} of "
                "the file at the latest); fields with commas or line breaks need quotes"
            )
    return rows


def _json_lines(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_object(json.loads(line), f"{path}, line {number}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected one JSON object a line ({error.msg})") from None
    return rows


def _json(path: Path, text: str) -> list[Row]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # Dataset.to_json writes one object a line into whatever name it is given
            return _json_lines(path, text)
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if isinstance(document, dict) and not all(isinstance(value, dict | list) for value in document.values()):
        return [document]  # one object a line, and one line
    if not isinstance(document, list):
        raise ValueError(
            f"{path}: expected an array of objects, one a row (pandas: to_json(path, orient='records')), "
            f"got {_kind(document)}"
        )
    return [_object(row, f"{path}, row {number}") for number, row in enumerate(document, 1)]


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with the columns as its names, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
