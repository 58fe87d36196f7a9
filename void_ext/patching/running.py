"""What a running ``generate()`` tells about its forwards, kept while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Generation:
    """What a running ``generate()`` tells about its forwards."""

    prompt_length: int
    fresh_cache: bool  # the caller handed no cache over
    beams: bool
    offset: int  # position of the first column of the ids that generate() works on
    rows: int  # of its batch
    masked: bool = False  # the caller gave a mask: where it is not seen again, it was all ones
    mask: Tensor | None = None  # [B, positions so far], as generate() extends it
    tokens: Tensor | None = None  # what the next forward consumes
    expected: bool = False  # the next forward is generate()'s own
    wrapped: bool = False  # somebody else prepares its inputs (PEFT puts virtual tokens before the prompt)
    started: bool = False
    first: int = 0  # position where this generation began to write
    length: int = 0  # of the ids when generate() last asked whether to stop
    ended: Tensor | None = None  # [B] bool, rows that generate() was told are done

    def take(self, end: int) -> None:
        """A forward up to position ``end`` whose inputs somebody else prepared; the first one holds the prompt."""
        if not self.started:
            self.offset += end - self.prompt_length
            self.prompt_length = end

    def stop(self, length: int, done: Tensor) -> None:
        """generate() holds ``length`` ids and was told which rows are done. The last id is not consumed any more."""
        self.length = length
        if done.dim() == 1 and done.shape[0] > 1:  # a single row ends with generate(), which the host sees
            self.ended = self.ended | done if self.ended is not None and self.ended.shape == done.shape else done
