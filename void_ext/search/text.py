"""The text that plans are found on and the one they are judged on: named by hash, cut into sequences, disjoint."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from void_ext._files import reworded

#: A tokenizer takes minutes for more, and a search reads a small part of it.
MAX_BYTES = 64 << 20
DEFAULT = "pydoc_data.topics"
#: So many tokens in a row are no turn of phrase: who reads them in both texts reads the same passage.
REPEATED = 32


@dataclass(frozen=True)
class Text:
    """A text and how to tell it from any other: its name and the sha256, in hex, of its UTF-8 bytes."""

    name: str
    content: str
    sha256: str

    @classmethod
    def of(cls, name: str, content: str) -> Text:
        return cls(name, content, hashlib.sha256(content.encode()).hexdigest())


@dataclass(frozen=True)
class Passage:
    """Sequences of one text.

    Attributes:
        ids: ``[S, T]`` int64, no padding; each row begins with the tokenizer's first special token, where it adds one.
        name, sha256: of the text it was cut from.
        role: ``"calibration"`` or ``"held out"``.
    """

    ids: Tensor
    name: str
    sha256: str
    role: str

    def to_dict(self) -> dict[str, Any]:
        """Without the tokens, which a hash over them names."""
        rows = self.ids.cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
        return {
            "role": self.role,
            "name": self.name,
            "sha256": self.sha256,
            "sequences": self.ids.shape[0],
            "length": self.ids.shape[1],
            "tokens_sha256": hashlib.sha256(rows).hexdigest(),
        }


def default_text() -> Text:
    """English prose that every Python carries: `pydoc_data.topics`, sorted by name, joined by blank lines."""
    from pydoc_data.topics import topics

    return Text.of(DEFAULT, "\n\n".join(topics[name] for name in sorted(topics)))


def read_text(path: str | os.PathLike[str], *, what: str = "path") -> Text:
    """A UTF-8 file, without its byte order mark if it has one.

    Raises OSError or ValueError, naming ``what``, for one that is missing, too large or not text.
    """
    place = Path(path)
    try:
        with place.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise reworded(error, f"{what}: {str(place)!r} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"{what}: expected at most {MAX_BYTES >> 20} MiB of text, {str(place)!r} is larger; take a part"
        )
    try:
        content = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: expected UTF-8 text, byte {error.start} of {str(place)!r} is not") from None
    if not content.strip():
        raise ValueError(f"{what}: expected text, {str(place)!r} has only white space")
    # A name need not be text. Plans and figures say it, and they are.
    return Text.of(os.fsencode(place.name).decode(errors="backslashreplace"), content)


def passages(
    tokenizer: Any, calibration: Text, held_out: Text | None, *, sequences: int, length: int
) -> tuple[Passage, Passage]:
    """Cut ``sequences`` sequences of ``length`` tokens for each of the two roles, spread evenly over their texts.

    Without ``held_out``, the first half of ``calibration`` calibrates and its second half is held out. Texts repeat
    themselves (the default one does): a held-out sequence that would share :data:`REPEATED` tokens in a row with a
    calibration sequence is taken from the nearest place that does not.

    Raises ValueError for a text that is too short (the message says how long it is and what fits), and where both are
    given and are the same text or share so many tokens in a row in their sequences.
    """
    first = _special(tokenizer)
    wanted = sequences * (length - len(first))
    tokens = _encode(tokenizer, calibration)
    if held_out is None:
        middle = len(tokens) // 2
        parts = ((calibration, tokens[:middle]), (calibration, tokens[middle:]))
    elif held_out.sha256 == calibration.sha256:
        raise ValueError(f"held-out text: expected another text than the calibration text {calibration.name!r}")
    else:
        parts = ((calibration, tokens), (held_out, _encode(tokenizer, held_out)))
    starts = []
    for role, (text, region) in zip(("calibration", "held out"), parts, strict=True):
        if len(region) < wanted:
            share = "half of " if held_out is None else ""
            raise ValueError(
                f"{role} text: expected at least {wanted} tokens for {sequences} sequences of {length}, {share}"
                f"{text.name!r} has {len(region)}; take a longer text, or fewer or shorter sequences"
            )
        starts.append(_spread(len(region), sequences, length - len(first)))
    width = length - len(first)
    known = {run for start in starts[0] for run in _runs(parts[0][1][start : start + width])}
    if held_out is None:
        starts[1] = _apart(parts[1][1], starts[1], width, known)
    for start in starts[1]:
        if any(run in known for run in _runs(parts[1][1][start : start + width])):
            raise ValueError(
                f"held out text: expected no {REPEATED} tokens in a row that a calibration sequence has too, "
                f"{parts[1][0].name!r} repeats some of {calibration.name!r} in token {start} to {start + width}; hold "
                "out another text, or take other numbers of sequences or tokens"
            )
    made = [
        Passage(torch.tensor([first + region[start : start + width] for start in places]), text.name, text.sha256, role)
        for role, (text, region), places in zip(("calibration", "held out"), parts, starts, strict=True)
    ]
    return made[0], made[1]


def _encode(tokenizer: Any, text: Text) -> list[int]:
    tokens: list[int] = tokenizer(text.content, add_special_tokens=False)["input_ids"]
    return tokens


def _special(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text; some put something behind it as well, which is not wanted here."""
    found: list[int] = tokenizer("a")["input_ids"]
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    return found[: found.index(plain[0])] if plain and plain[0] in found else []


def _spread(tokens: int, sequences: int, width: int) -> list[int]:
    """Where sequences of ``width`` tokens begin, from one end of so many tokens to the other."""
    return [(tokens - width) * index // max(sequences - 1, 1) for index in range(sequences)]


def _runs(tokens: list[int]) -> Iterator[tuple[int, ...]]:
    return (tuple(tokens[start : start + REPEATED]) for start in range(len(tokens) - REPEATED + 1))


def _apart(region: list[int], starts: list[int], width: int, known: set[tuple[int, ...]]) -> list[int]:
    """``starts``, each moved as little as it must be to have none of the known runs, and not into a neighbour; one
    with no such place stays."""
    moved: list[int] = []
    for index, start in enumerate(starts):
        if any(run in known for run in _runs(region[start : start + width])):
            low = moved[-1] + width if moved else 0
            high = (starts[index + 1] if index + 1 < len(starts) else len(region)) - width
            # How many known runs begin before each place; a sequence has those that begin in its first tokens.
            sums = [0, *itertools.accumulate(run in known for run in _runs(region[low : high + width]))]
            inside = width - REPEATED + 1
            free = [low + place for place in range(high - low + 1) if sums[place + inside] == sums[place]]
            start = min(free, key=lambda place: abs(place - start), default=start)
        moved.append(start)
    return moved
