"""One question of a data set, whatever file it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

LETTERS = "ABCD"


@dataclass(frozen=True)
class Item:
    """A question with its options, in the order in which they are shown.

    Attributes:
        dataset: ``"mmlu"``, ``"gpqa_diamond"`` or ``"boolq"``.
        key: 16 hexadecimal digits of SHA-256 over the content as the data set has it, independent of the file's format
            and of the row's place in it; the second copy of a row ends in ``#2``.
        question: as in the data set, white space included.
        options: the texts that can be right; ``("True", "False")`` for BoolQ.
        answer: index of the right one in ``options``.
        passage: the text that a BoolQ question is about.
        subject: of an MMLU question.
    """

    dataset: str
    key: str
    question: str
    options: tuple[str, ...]
    answer: int
    passage: str = ""
    subject: str = ""

    @property
    def position(self) -> str:
        """Where the right answer stands: ``"A"`` to ``"D"``, or ``"True"`` or ``"False"`` in BoolQ."""
        return self.options[self.answer] if self.dataset == "boolq" else LETTERS[self.answer]


def content_key(*parts: str) -> str:
    """The key of an item made of these texts; where one text ends and the next begins counts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:16]
