"""Usage pooled over all forward calls of an evaluation, added up on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from void_ext._options import alpha_text
from void_ext.store import PHASES, RESPONSE

if TYPE_CHECKING:
    from torch import Tensor

    from void_ext.trace import PhaseTrace, Trace


@dataclass(frozen=True)
class PhaseUsage:
    """Counts of one phase.

    Attributes:
        tokens: real tokens.
        active: per alpha (as ``"0.8"``), per layer: the tokens for which it was active.
        executed: per layer: the tokens for which at least a half of it ran.
    """

    tokens: int
    active: dict[str, list[int]]
    executed: list[int]

    def usage(self, alpha: float) -> list[float]:
        """Per layer, the share of tokens for which it was active; NaN without a token."""
        return [count / self.tokens if self.tokens else float("nan") for count in self.active[alpha_text(alpha)]]


def pool(phases: Sequence[PhaseUsage]) -> PhaseUsage:
    """The sum of these counts: of several tasks, or of one task's shares in several processes."""

    def add(rows: Sequence[list[int]]) -> list[int]:
        return [sum(column) for column in zip(*rows, strict=True)]

    active = {alpha: add([phase.active[alpha] for phase in phases]) for alpha in phases[0].active}
    return PhaseUsage(sum(phase.tokens for phase in phases), active, add([phase.executed for phase in phases]))


class Tally:
    """Adds traces up.

    Args:
        alphas: thresholds' factors at which layers are judged.

    Cost: per call and alpha one pass over the norms of its tokens, 4(L+1) bytes each; nothing is read back from the
    device before :meth:`result`.
    """

    def __init__(self, alphas: Sequence[float]):
        self.alphas = tuple(dict.fromkeys(alphas))
        self._counts: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._layers = 0

    def add(self, trace: Trace, answer_lengths: Tensor | None = None) -> None:
        """Count the real tokens of a trace that is complete; of the response at most so many in each row."""
        self._layers = trace.num_layers
        for phase in (trace.prompt, trace.response):
            if not phase.mask.shape[1]:
                continue
            if answer_lengths is not None and phase.name == PHASES[RESPONSE]:
                places = torch.arange(phase.mask.shape[1], device=phase.mask.device)
                phase.mask = phase.mask & (places < answer_lengths.to(phase.mask.device)[:, None])
            counts, tokens = self._count(phase)
            if phase.name in self._counts:
                self._counts[phase.name] += counts
                self._tokens[phase.name] += tokens
            else:
                self._counts[phase.name], self._tokens[phase.name] = counts, tokens

    def _count(self, phase: PhaseTrace) -> tuple[Tensor, Tensor]:
        real = phase.mask[..., None]
        tables = [phase.active(alpha) for alpha in self.alphas]
        if phase.info.mode == "skip":
            tables.append(phase.executed)
        counts = torch.stack([(table & real).sum((0, 1)) for table in tables])
        return counts, phase.mask.sum()

    def result(self) -> dict[str, PhaseUsage]:
        """The counts of both phases, on the host."""
        found = {}
        for name in PHASES:
            if name not in self._counts:
                nothing = [0] * self._layers
                found[name] = PhaseUsage(0, {alpha_text(alpha): list(nothing) for alpha in self.alphas}, nothing)
                continue
            tokens = int(self._tokens[name])
            rows = self._counts[name].tolist()
            active = {alpha_text(alpha): row for alpha, row in zip(self.alphas, rows, strict=False)}
            executed = rows[len(self.alphas)] if len(rows) > len(self.alphas) else [tokens] * self._layers
            found[name] = PhaseUsage(tokens, active, executed)
        return found
