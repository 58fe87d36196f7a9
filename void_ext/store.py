"""Where traced norms live: one growing table per trace, on the device of the model.

Rows are addressed by (batch row, cache position). Everything that is the same for all rows of a position (its phase,
the forward call that wrote it) is kept on the host; nothing here reads a device tensor back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from void_ext._capturing import capturing

try:
    from void_ext._host import put_positions
except ImportError:  # a trace can be read where nothing is built

    def put_positions(table: Tensor, start: int, end: int, value: Tensor | int) -> bool:
        return False


PHASES = ("prompt", "response")
PROMPT, RESPONSE = 0, 1
_UNSEEN = -1
_MIN_CAPACITY = 64


@dataclass(frozen=True)
class TraceInfo:
    """What was traced and how; the part of a trace that is not a table."""

    alpha: float = 0.8
    granularity: str = "token"
    reference_quirks: bool = False
    mode: str = "trace"
    dtype: str = "float32"
    model_type: str = ""
    model_name: str = ""


class TraceStore:
    """The tables of one trace: preallocated, grown by doubling, overwritten where a position is written again.

    Cost per position and batch row: 4(L+1) bytes of norms, 8 of token, 1 of mask; 4L more for updates and for halves, L
    for executed (which exists only where layers are skipped).
    """

    def __init__(
        self,
        batch: int,
        layers: int,
        device: torch.device,
        *,
        updates: bool = False,
        halves: bool = False,
        executed: bool = False,
    ):
        self.batch = batch
        self.layers = layers
        self.device = device
        self.length = 0
        self.capacity = 0  # positions that there is room for
        self.phase: list[int] = []  # of each position; _UNSEEN where nothing was written
        self.call: list[int] = []  # which forward call wrote it last
        self.ordered = True
        self._tables: dict[str, Tensor] = {}
        self._new = {
            "norms": ((layers + 1,), torch.float32, 0),
            "tokens": ((), torch.int64, -1),
            "mask": ((), torch.bool, False),
        }
        if updates:
            self._new["updates"] = ((layers,), torch.float32, 0)
        if halves:
            self._new["halves"] = ((layers,), torch.float32, 0)
        if executed:
            self._new["executed"] = ((layers,), torch.bool, False)

    @property
    def tables(self) -> list[Tensor]:
        """The tables as they are, room for more positions included."""
        return list(self._tables.values())

    def has(self, name: str) -> bool:
        return name in self._new

    def reserve(self, length: int) -> None:
        """Make room for positions below ``length``."""
        if length <= self.capacity:
            return
        if self._tables and capturing(self.device):
            raise RuntimeError(
                f"void_ext: a CUDA graph is being captured, and the trace has no room for position {length - 1}; grown "
                "there, it would grow in each replay. Run one call of that many tokens before the capture"
            )
        capacity = max(length, 2 * self.capacity, _MIN_CAPACITY)
        # A tensor made under inference_mode could not be written under no_grad later on.
        with torch.inference_mode(False), torch.no_grad():
            for name, (shape, dtype, fill) in self._new.items():
                table = torch.full((self.batch, capacity, *shape), fill, dtype=dtype, device=self.device)
                if name in self._tables:
                    table[:, : self.length].copy_(self._tables[name][:, : self.length])
                self._tables[name] = table
        self.capacity = capacity

    def write(
        self,
        start: int,
        length: int,
        phases: Sequence[int],
        call: int,
        tables: dict[str, Tensor],
        tokens: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Store ``length`` positions from ``start`` on; tables are ``[batch, length, …]``, mask None means all real."""
        end = start + length
        if end + length > self.capacity:
            # One more such call finds room: it may be captured by a CUDA graph, where the tables must not grow.
            self.reserve(end if capturing(self.device) else end + length)
        for name, value in tables.items():
            self._put(name, start, end, value)
        self._put("tokens", start, end, -1 if tokens is None else tokens)
        self._put("mask", start, end, True if mask is None else mask)
        if end > self.length:
            self.phase.extend([_UNSEEN] * (end - self.length))
            self.call.extend([_UNSEEN] * (end - self.length))
            self.length = end
        self.phase[start:end] = phases
        self.call[start:end] = [call] * length

    def _put(self, name: str, start: int, end: int, value: Tensor | int) -> None:
        table = self._tables[name]
        if put_positions(table, start, end, value):
            return
        if isinstance(value, Tensor):
            table[:, start:end].copy_(value)
        else:
            table[:, start:end].fill_(value)

    def begin_generation(self, prompt_length: int, mask: Tensor | bool) -> None:
        """What was generated before is part of the prompt now; ``mask`` is the caller's word on which of it is real.

        It is the last word: the eos that a row of a batch ended with counts if the next turn says so, as it does in a
        row alone, or without the cache. True: all of it is real. False: the caller said nothing.
        """
        written = [position for position in range(min(self.length, prompt_length)) if self.phase[position] != _UNSEEN]
        for position in written:
            self.phase[position] = PROMPT
        if mask is False or not written:
            return
        end = written[-1] + 1
        where: slice | list[int] = slice(0, end) if len(written) == end else written
        if mask is True:
            self._tables["mask"][:, where] = True
        elif mask.shape[0] == self.batch and mask.shape[1] >= end:
            self._tables["mask"][:, where] = mask[:, where].to(self.device) != 0

    def end_rows(self, end: int) -> None:
        """What was written from position ``end`` on is not real: candidates, say, that nobody took."""
        if end < self.length:
            self._tables["mask"][:, end : self.length].fill_(False)

    def crop(self, length: int) -> None:
        """Forget the positions from ``length`` on (a cache was cropped)."""
        if length < self.length:
            del self.phase[length:], self.call[length:]
            self._tables["mask"][:, length : self.length].fill_(False)
            self.length = length

    def positions(self, phase: int) -> list[int]:
        return [position for position, value in enumerate(self.phase) if value == phase]

    def calls(self, positions: list[int]) -> list[int]:
        return [self.call[position] for position in positions]

    def view(self, name: str) -> Tensor:
        """Table ``name`` at all positions so far, ``[batch, length, …]``: a view, good until the next write."""
        self.reserve(1)
        return self._tables[name][:, : self.length]

    def read(self, name: str, positions: list[int]) -> Tensor:
        """A copy of table ``name`` at ``positions``: ``[batch, len(positions), …]``."""
        shape, dtype, _ = self._new[name]
        if not positions:
            return torch.empty((self.batch, 0, *shape), dtype=dtype, device=self.device)
        table = self._tables[name]
        first, last = positions[0], positions[-1]
        if last - first + 1 == len(positions):
            return table[:, first : last + 1].clone()
        return table[:, torch.tensor(positions, device=table.device)]
