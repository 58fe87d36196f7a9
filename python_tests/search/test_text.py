"""Texts: what they are named by, how they are cut, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from void_ext.search import Text, default_text, passages, read_text
from void_ext.search import text as module


class Words:
    """A tokenizer of one number a word, with 1 before a text and, if asked, 2 behind it."""

    def __init__(self, begins: bool = True, ends: bool = False):
        self.begins, self.ends = begins, ends

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        ids = [int(word) if word.isdecimal() else 3 for word in text.split()]
        if add_special_tokens:
            ids = [1] * self.begins + ids + [2] * self.ends
        return {"input_ids": ids}


def numbers(first: int, count: int) -> Text:
    return Text.of("numbers", " ".join(map(str, range(first, first + count))))


def test_the_default_is_prose_named_by_its_hash() -> None:
    text = default_text()
    assert text == default_text()
    assert len(text.content) > 100_000
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()


@pytest.mark.parametrize("ends", [False, True])
def test_sequences_are_spread_and_the_halves_disjoint(ends: bool) -> None:
    calibration, held_out = passages(Words(ends=ends), numbers(10, 100), None, sequences=3, length=5)
    assert calibration.ids.tolist() == [[1, *range(start, start + 4)] for start in (10, 33, 56)]
    assert held_out.ids.tolist() == [[1, *range(start, start + 4)] for start in (60, 83, 106)]
    assert (calibration.role, held_out.role) == ("calibration", "held out")
    assert calibration.sha256 == held_out.sha256 == numbers(10, 100).sha256


def test_a_text_of_its_own_is_held_out_whole() -> None:
    calibration, held_out = passages(Words(begins=False), numbers(10, 8), numbers(100, 9), sequences=2, length=4)
    assert calibration.ids.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert held_out.ids.tolist() == [[100, 101, 102, 103], [105, 106, 107, 108]]
    assert calibration.to_dict()["tokens_sha256"] != held_out.to_dict()["tokens_sha256"]
    assert torch.equal(
        passages(Words(begins=False), numbers(10, 8), None, sequences=1, length=4)[0].ids, calibration.ids[:1]
    )


def test_short_and_equal_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="calibration text: expected at least 12 tokens for 3 sequences of 5, half of"):
        passages(Words(), numbers(10, 20), None, sequences=3, length=5)
    with pytest.raises(ValueError, match=r"held out text: expected at least 12 tokens .* 'numbers' has 11"):
        passages(Words(), numbers(10, 20), numbers(50, 11), sequences=3, length=5)
    with pytest.raises(ValueError, match="another text than the calibration text 'numbers'"):
        passages(Words(), numbers(10, 20), numbers(10, 20), sequences=1, length=5)


def shared(one: Any, other: Any, count: int) -> bool:
    """Whether any rows of two passages have so many tokens in a row in common, by looking at every pair."""
    return any(
        row[i : i + count] == known[j : j + count]
        for row in one.ids.tolist()
        for known in other.ids.tolist()
        for i in range(len(row) - count + 1)
        for j in range(len(known) - count + 1)
    )


def test_a_held_out_sequence_does_not_repeat_a_calibration_sequence() -> None:
    """The second half of a text that repeats itself: a part of the first 60 numbers stands there once more."""
    words = [*range(100, 400), *range(500, 510), *range(110, 145), *range(600, 855)]
    text = Text.of("repeating", " ".join(map(str, words)))
    calibration, held_out = passages(Words(), text, None, sequences=4, length=51)
    assert calibration.ids[0, 1:].tolist() == list(range(100, 150))
    assert held_out.ids[0, 1:].tolist() == [*range(114, 145), *range(600, 619)]  # 31 of them may stay
    assert held_out.ids[1:, 1].tolist() == [638, 721, 805]  # spread as ever
    assert shared(held_out, calibration, 31)
    assert not shared(held_out, calibration, 32)
    fewer = Text.of("repeating", " ".join(map(str, [*words[:310], *range(110, 141), *range(600, 859)])))
    _, held_out = passages(Words(), fewer, None, sequences=4, length=51)
    assert held_out.ids[0, 1:11].tolist() == list(range(500, 510))  # not moved


def test_texts_that_share_a_passage_are_refused() -> None:
    """Such as a text and its copy with a word changed, which has another hash."""
    for count, fits in ((31, True), (32, False)):
        other = Text.of("copy", " ".join(map(str, [*range(500, 510), *range(20, 20 + count), *range(600, 660)])))
        if fits:
            passages(Words(), numbers(10, 100), other, sequences=1, length=51)
            continue
        message = (
            r"no 32 tokens in a row that a calibration sequence has too, 'copy' repeats some of 'numbers' in token 0"
        )
        with pytest.raises(ValueError, match=message):
            passages(Words(), numbers(10, 100), other, sequences=1, length=51)
    every = Text.of("same", "7 " * 200)
    with pytest.raises(ValueError, match="'same' repeats some of 'same'"):
        passages(Words(), every, None, sequences=2, length=40)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prose.txt"
    path.write_text("Wörter", encoding="utf-8")
    assert read_text(path) == Text.of("prose.txt", "Wörter")
    path.write_bytes(b"\xef\xbb\xbfhi\r\n")  # begins with a byte order mark
    assert read_text(path) == Text.of("prose.txt", "hi\r\n")
    path.write_bytes(b"\xef\xbb\xbf \n")
    with pytest.raises(ValueError, match="only white space"):
        read_text(path)
    with pytest.raises(FileNotFoundError, match=r"^--text: .*none\.txt' cannot be read") as caught:
        read_text(tmp_path / "none.txt", what="--text")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(IsADirectoryError, match="cannot be read"):
        read_text(tmp_path)
    path.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(ValueError, match="expected UTF-8 text, byte 2"):
        read_text(path)
    path.write_text(" \n")
    with pytest.raises(ValueError, match="only white space"):
        read_text(path)
    monkeypatch.setattr(module, "MAX_BYTES", 1 << 20)
    path.write_bytes(b"a" * ((1 << 20) + 1))
    with pytest.raises(ValueError, match="at most 1 MiB"):
        read_text(path)


def test_a_name_that_is_no_text_is_made_printable(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("prose")
    assert read_text(path).name == "caf\\xe9.txt"
    other = tmp_path / "café.txt"
    other.write_text("prose")
    assert read_text(other).name == "café.txt"
