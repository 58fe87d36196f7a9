"""What skipping launched and what it left out, counted where it is launched."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PhaseCounters:
    """Sums over the forward calls of one phase.

    Attributes:
        calls: forward calls of the layer stack.
        attention_run, attention_projected, attention_skipped: attention halves by what was launched: all of it, K and V
            for the cache alone, nothing.
        mlp_run, mlp_skipped: the same of MLP halves.
        layers_run, layers_projected, layers_skipped: layers of which some half was run, of which K and V alone were
            made, of which nothing was launched.
        rows_needed: rows (tokens of a batch row, per half) the plan wanted run.
        rows_computed: rows the launched halves went over; more than needed where a batch's rows differ.
        weight_bytes: bytes of parameters of what was launched, once per launch. Embedding, final norm and head are not
            in it. With tensor parallelism the whole model's, on every rank; each reads its share of them.
    """

    calls: int = 0
    attention_run: int = 0
    attention_projected: int = 0
    attention_skipped: int = 0
    mlp_run: int = 0
    mlp_skipped: int = 0
    layers_run: int = 0
    layers_projected: int = 0
    layers_skipped: int = 0
    rows_needed: int = 0
    rows_computed: int = 0
    weight_bytes: int = 0

    def __add__(self, other: PhaseCounters) -> PhaseCounters:
        result = PhaseCounters(**asdict(self))
        result.add(other)
        return result

    def add(self, other: PhaseCounters) -> None:
        """Add ``other`` to this one."""
        mine = self.__dict__
        for name, value in other.__dict__.items():
            mine[name] += value


@dataclass
class Counters:
    """Counters of both phases since the patch or :meth:`reset`. A call counts for the phase of its last token."""

    prompt: PhaseCounters = field(default_factory=PhaseCounters)
    response: PhaseCounters = field(default_factory=PhaseCounters)

    @property
    def total(self) -> PhaseCounters:
        return self.prompt + self.response

    def reset(self) -> None:
        self.prompt, self.response = PhaseCounters(), PhaseCounters()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
