"""A plan as one forward call needs it: for each half of each layer whether all rows, no rows or some rows run it.

What the host knows decides what is launched; the row masks of halves where rows differ live on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from void_ext._capturing import capturing
from void_ext.plan import Action, PhasePlan

NONE, PROJECT, ALL, SOME = 0, 1, 2, 3
_MASKS = 8  # sizes of calls to keep masks for: a prompt's, its chunks', a decode step's


@dataclass
class Schedule:
    """What each half of each layer does in one forward call.

    Attributes:
        attention: per layer NONE (nothing is launched), PROJECT (K and V for the cache), ALL or SOME rows.
        mlp: per layer NONE, ALL or SOME.
        attention_rows, mlp_rows: where SOME: which rows, ``[L, B]`` bool on the host; None in uniform schedules.
        phase: of the call's last position, for the counters.
        skipped: layers whose K and V are not made: what leaves holes in a cache.
        needed: the others.
        whole: every half runs for all rows.
    """

    attention: list[int]
    mlp: list[int]
    attention_rows: Tensor | None = None
    mlp_rows: Tensor | None = None
    phase: int = 0
    skipped: tuple[int, ...] = field(init=False)
    needed: tuple[int, ...] = field(init=False)
    whole: bool = field(init=False)
    _executed: Tensor | None = field(default=None, repr=False)
    _masks: dict[tuple[torch.device, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.skipped = tuple(layer for layer, code in enumerate(self.attention) if code == NONE)
        self.needed = tuple(layer for layer, code in enumerate(self.attention) if code != NONE)
        self.whole = {*self.attention, *self.mlp} == {ALL}

    @property
    def rows(self) -> int | None:
        """Batch rows the schedule was made for; None: any number, all alike."""
        return None if self.attention_rows is None else self.attention_rows.shape[1]

    def masks(self, device: torch.device, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """``[L, batch * length]`` bool on ``device``: the rows that run attention, and those that run the MLP."""
        key = (device, batch, length)
        if key not in self._masks:
            assert self.attention_rows is not None
            assert self.mlp_rows is not None
            _refuse_captured(device, batch, length)
            made = []
            for rows in (self.attention_rows, self.mlp_rows):
                spread = rows.repeat_interleave(length, 1) if rows.shape[1] != batch * length else rows
                if device.type == "cuda":
                    spread = spread.pin_memory().to(device, non_blocking=True)
                made.append(spread)
            if len(self._masks) == _MASKS:
                del self._masks[next(iter(self._masks))]
            self._masks[key] = (made[0], made[1])
        return self._masks[key]

    def on_device(self) -> list[Tensor]:
        """What calls have read of it on the device."""
        made = [mask for pair in self._masks.values() for mask in pair]
        return made if self._executed is None else [*made, self._executed]

    def counts(self, layer: int, batch: int, length: int) -> tuple[int, int]:
        """Rows (of ``batch * length``) the plan wants to run attention and MLP of ``layer`` for; PROJECT counts too."""
        total = batch * length
        return (
            self._count(self.attention[layer], self.attention_rows, layer, total),
            self._count(self.mlp[layer], self.mlp_rows, layer, total),
        )

    def _count(self, code: int, rows: Tensor | None, layer: int, total: int) -> int:
        if code == NONE:
            return 0
        if code != SOME or rows is None:
            return total
        return int(self._sums(rows)[layer]) * total // rows.shape[1]

    def _sums(self, rows: Tensor) -> list[int]:
        name = "_attention_sums" if rows is self.attention_rows else "_mlp_sums"
        if name not in self.__dict__:
            self.__dict__[name] = rows.sum(1).tolist()  # a host tensor: nothing waits
        sums: list[int] = self.__dict__[name]
        return sums

    def executed(self, device: torch.device, batch: int, length: int) -> Tensor:
        """``[batch, length, L]`` bool, or what broadcasts to it: layers of which a half ran for the row."""
        layers = len(self.attention)
        if self.attention_rows is None:
            if self._executed is None or self._executed.device != device:
                _refuse_captured(device, batch, length)
                ran = [a == ALL or m == ALL for a, m in zip(self.attention, self.mlp, strict=True)]
                # Not an inference tensor, whatever mode this call is in: the next one may not be.
                with torch.inference_mode(False):
                    self._executed = torch.tensor(ran).to(device, non_blocking=True)
            return self._executed
        attention, mlp = self.masks(device, batch, length)
        return (attention | mlp).T.reshape(batch, length, layers)


def _refuse_captured(device: torch.device, batch: int, length: int) -> None:
    # What a graph copies from is gone when it is replayed.
    if capturing(device):
        raise RuntimeError(
            f"void_ext: a CUDA graph is being captured, and this plan has not been on {device} yet for {batch} rows of "
            f"{length} tokens. Run one such call before the capture"
        )


def of_phase(plan: PhasePlan, phase: int, ended: Sequence[bool] = ()) -> Schedule:
    """The schedule of a call whose positions are all of one phase. Rows that ended want nothing any more."""
    rows = torch.tensor(plan.collapse().table())  # [B, 2, L]
    if len(rows) == 1:
        attention, mlp = rows[0].tolist()
        return Schedule(attention, mlp, phase=phase)
    if any(ended):
        rows[torch.tensor(ended)] = int(Action.SKIP)
    return _differing(rows[:, 0].T, rows[:, 1].T, phase)


def of_phases(plans: Sequence[PhasePlan], phase: int, batch: int) -> Schedule:
    """The schedule of a call whose positions have plans of their own (no cache: prompt and response at once)."""
    spread = [torch.tensor(plan.table()).expand(batch, -1, -1) for plan in plans]
    rows = torch.stack(spread, 1).flatten(0, 1)  # [B, T, 2, L] -> [B * T, 2, L]
    return _differing(rows[:, 0].T, rows[:, 1].T, phase)


def _differing(attention: Tensor, mlp: Tensor, phase: int) -> Schedule:
    """From action codes ``[L, rows]``."""
    run_attention, run_mlp = attention == int(Action.RUN), mlp == int(Action.RUN)
    projected = (attention == int(Action.PROJECT)).any(1).tolist()
    codes = []
    for runs in (run_attention, run_mlp):
        every, some = runs.all(1).tolist(), runs.any(1).tolist()
        codes.append([ALL if e else SOME if s else NONE for e, s in zip(every, some, strict=True)])
    codes[0] = [PROJECT if c == NONE and p else c for c, p in zip(codes[0], projected, strict=True)]
    return Schedule(codes[0], codes[1], run_attention, run_mlp, phase)
