"""Where a data set comes from: a directory of the user's, the Hugging Face cache, or the hub; one reader for all."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from void_ext.evaluate.protocol.datasets import DATASETS, ORDERS, DataSet
from void_ext.evaluate.protocol.items import Item
from void_ext.evaluate.protocol.reading import FORMATS, Row, read_rows
from void_ext.evaluate.tasks import DataError
from void_ext.models import Progress
from void_ext.models._common import silent
from void_ext.models._load import hub_out_of_reach

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True)
class Loaded:
    """The items of a data set and where they came from.

    Attributes:
        data: which data set.
        items: in the order of the file.
        files: what was read.
        sha256: of the files' bytes, one after the other.
        notes: what a reader of the results has to know: copies, items that are not the published number.
    """

    data: DataSet
    items: tuple[Item, ...]
    files: tuple[Path, ...]
    sha256: str
    notes: tuple[str, ...]


def load_items(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    order: str = "hash",
    drop_duplicates: bool = False,
    progress: Progress = silent,
) -> Loaded:
    """The items of one data set.

    Args:
        name: ``"mmlu"``, ``"gpqa_diamond"`` or ``"boolq"``.
        data_dir: a directory with local files, see :func:`local_files`; None: the Hugging Face cache, else the hub.
        order: of GPQA's options: ``"hash"`` or ``"paper"`` (the right one is always D).
        drop_duplicates: leave out every item that was there before; otherwise copies are kept, and told in ``notes``.
        progress: called as ``progress(what, done, total)``.

    Raises:
        DataError: there is no such file here and the hub cannot be reached, or refuses; says what to fetch and where
            to put it.
        ValueError: columns are missing, there are no rows, or a row makes no sense (file, row and column are named).
    """
    if name not in DATASETS:
        raise ValueError(f"data set: expected one of {', '.join(DATASETS)}, got {name!r}")
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    data = DATASETS[name]
    progress(f"reading {name}", 0, 0)
    files = local_files(data, data_dir) if data_dir is not None else (_from_hub(data, progress),)
    digest, items = hashlib.sha256(), list[Item]()
    for path in files:
        digest.update(path.read_bytes())
        items.extend(_items(data, path, read_rows(path), order))
    if not items:
        raise ValueError(f"{files[0]}: holds no rows. {_what_to_fetch(data)}")
    kept, notes = _with_copies(data, items, drop_duplicates)
    if len(items) != data.size:
        notes.append(f"{name}: {len(items):,} rows; the published split has {data.size:,}")
    return Loaded(data, tuple(kept), files, digest.hexdigest(), tuple(notes))


def local_files(data: DataSet, data_dir: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The file of a data set in a directory, or all of its shards.

    With ``NAME`` and the hub's ``USER/REPO``, the first that is there of: the hub's own file below ``DIR/USER/REPO``,
    ``DIR/REPO``, ``DIR/NAME`` or ``DIR``; then ``DIR/NAME.*``, ``DIR/NAME/SPLIT.*`` and ``DIR/NAME/NAME.*``, with the
    endings parquet, jsonl, json and csv.

    Raises:
        DataError: there is none, or one in several formats.
    """
    directory = Path(data_dir).expanduser()
    if not directory.is_dir():
        raise DataError(f"--data-dir: {str(directory)!r} is not a directory. {_what_to_fetch(data)}")
    for pattern in _patterns(data):
        found = sorted(path for path in directory.glob(pattern) if path.is_file() and path.suffix.lower() in FORMATS)
        if found:
            return _one_table(found)
    zips = [
        str(path.relative_to(directory)) for pattern in ("*.zip", "*/*.zip") for path in sorted(directory.glob(pattern))
    ]
    locked = ""
    if zips and data.name == "gpqa_diamond":
        locked = (
            f" There is {zips[0]}: GPQA's archive is locked with a password, which stands in the README at "
            f"github.com/idavidrein/gpqa; unpack it (unzip {zips[0]}) so that gpqa_diamond.csv lies in the directory."
        )
    raise DataError(f"--data-dir: {str(directory)!r} holds nothing of {data.name}.{locked} {_what_to_fetch(data)}")


def _patterns(data: DataSet) -> Iterator[str]:
    repository = data.hub_id.partition("/")[2]
    below = re.sub(r"-\d{5}-of-\d{5}", "*", data.hub_file)
    for base in dict.fromkeys((f"{data.hub_id}/", f"{repository}/", f"{data.name}/", "", "dataset/", "*/dataset/")):
        yield base + below
    yield f"{data.name}.*"
    yield f"{data.name}/{data.split}.*"
    yield f"{data.name}/{data.name}.*"


def _one_table(found: list[Path]) -> tuple[Path, ...]:
    if len(found) == 1 and _SHARD.search(found[0].stem) is None:
        return (found[0],)
    shards = [_SHARD.search(path.stem) for path in found]
    numbers = [(int(match[1]), int(match[2])) for match in shards if match is not None]
    if len(numbers) < len(found):
        raise DataError(
            f"--data-dir: expected one file of the data set, found {' and '.join(map(str, found))}; keep one of them"
        )
    if numbers != [(index, len(found)) for index in range(len(found))]:
        raise DataError(f"--data-dir: {found[0].parent} holds {len(found)} of {numbers[0][1]} parts; fetch the others")
    return tuple(found)


def _items(data: DataSet, path: Path, rows: list[Row], order: str) -> Iterator[Item]:
    if rows:
        missing = [column for column in data.columns if column not in rows[0]]
        if missing:
            raise ValueError(
                f"{path}: expected the columns {', '.join(data.columns)} of {data.hub_id}; missing: "
                f"{', '.join(missing)}; found: {', '.join(map(str, rows[0]))}. {_what_to_fetch(data)}"
            )
    for number, row in enumerate(rows, 1):
        try:
            yield data.item(row, order)
        except KeyError as error:
            raise ValueError(f"{path}, row {number}: has no column {error.args[0]}, which row 1 has") from None
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}. Mend the row or leave it out") from None


def _with_copies(data: DataSet, items: list[Item], drop: bool) -> tuple[list[Item], list[str]]:
    """Items with keys that are all different, and what there is to say about copies."""
    first: dict[str, int] = {}
    copies: list[tuple[int, int]] = []
    contradictions, seen, kept = 0, Counter[str](), list[Item]()
    for index, item in enumerate(items):
        seen[item.key] += 1
        if seen[item.key] == 1:
            first[item.key] = index
            kept.append(item)
            continue
        copies.append((first[item.key], index))
        contradictions += items[first[item.key]].answer != item.answer
        if not drop:
            kept.append(replace(item, key=f"{item.key}#{seen[item.key]}"))
    notes = []
    if copies:
        one, two = copies[0]
        what = "left out" if drop else "kept, as the published figures count them (--drop-duplicates leaves them out)"
        contrary = f", {contradictions} of them with another right answer" if contradictions else ""
        notes.append(
            f"{data.name}: {len(copies)} of {len(items):,} rows are copies of earlier ones (row {two + 1} of row "
            f"{one + 1}){contrary}; {what}"
        )
    twins = sum(len(set(item.options)) < len(item.options) for item in kept)
    if twins:
        notes.append(f"{data.name}: {twins} of {len(kept):,} items show the same text under two letters; one counts")
    return kept, notes


def _what_to_fetch(data: DataSet) -> str:
    columns = ", ".join(data.columns)
    return (
        f"Fetch {data.hub_file} of the data set {data.hub_id} ({data.size:,} rows; columns {columns}): "
        f"hf download {data.hub_id} {data.hub_file} --repo-type dataset --local-dir DIR/{data.name}, then "
        f"--data-dir DIR. Also taken: DIR/{data.name}.parquet, .jsonl, .json or .csv with these columns."
        + (f" {data.note}" if data.note else "")
    )


def _from_hub(data: DataSet, progress: Progress) -> Path:
    from huggingface_hub import errors, hf_hub_download

    progress(f"fetching {data.hub_id}", 0, 0)
    try:
        offline = hub_out_of_reach()
        return Path(hf_hub_download(data.hub_id, data.hub_file, repo_type="dataset", local_files_only=offline))
    except errors.GatedRepoError:
        raise DataError(f"{data.name}: the hub does not hand out {data.hub_id} yet. {data.note}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        raise DataError(
            f"{data.name}: there is no --data-dir, {data.hub_id} is not in the Hugging Face cache, and the hub cannot "
            f"be reached. On a machine with network: {_what_to_fetch(data)}"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{data.name}: the hub did not give {data.hub_id} ({text}). {_what_to_fetch(data)}") from None
