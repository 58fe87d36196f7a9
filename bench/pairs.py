"""A cell of the benchmarks that compare two things in turns, with an A/A control, and the file they are kept in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.environment import describe, write_json
from void_ext import timing

# What tracing may cost, as the traced model's time over the unpatched one's.
LIMITS = {"fuse=add": 1.02, "fuse=norm": 1.00}


def row(comparison: timing.Comparison, limit: float | None = None, **cell: Any) -> dict[str, Any]:
    """A result row: the cell's description, the ratio with its interval, the control's, the verdict, the raw times."""
    limit = LIMITS.get(cell["variant"]) if limit is None else limit
    return cell | {
        "base_seconds": comparison.a_median,
        "subject_seconds": comparison.b_median,
        "ratio": comparison.ratio,
        "low": comparison.low,
        "high": comparison.high,
        "control_low": comparison.aa_low,
        "control_high": comparison.aa_high,
        "pairs": comparison.pairs,
        "limit": limit,
        "verdict": "–" if limit is None else comparison.verdict(limit),
        "times": {"base": comparison.a_seconds, "subject": comparison.b_seconds},
    }


class Ledger:
    """The rows measured so far, written after each; a cell that is there is not measured again."""

    def __init__(self, path: Path, kind: str, device: str, earlier: Iterable[dict[str, Any]] = ()):
        self.path, self.kind, self.device = path, kind, device
        self.rows = list(earlier)
        self.unavailable: list[dict[str, Any]] = []

    def has(self, **cell: Any) -> bool:
        return any(all(row[name] == value for name, value in cell.items()) for row in self.rows)

    def measure(
        self,
        base: Callable[[], object],
        subject: Callable[[], object],
        cell: dict[str, Any],
        limit: float | None = None,
        extra: dict[str, Any] | None = None,
        **how: Any,
    ) -> None:
        began = time.monotonic()
        self.rows.append(row(timing.compare(base, subject, **how), limit, **cell) | (extra or {}))
        last = self.rows[-1]
        print(
            f"{cell['model']} {cell['work']} {cell['variant']} ({cell.get('threads') or self.device}): "
            f"{last['ratio']:.4f} [{last['low']:.4f}, {last['high']:.4f}], A/A [{last['control_low']:.4f}, "
            f"{last['control_high']:.4f}], {last['pairs']} pairs, {last['verdict']}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        self.save()

    def miss(self, cell: dict[str, Any], error: Exception) -> None:
        """The cell cannot be measured here; the file says why, and a later call tries it again."""
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        self.unavailable.append(cell | {"why": why})
        print(f"{cell['model']} {cell['work']} {cell['variant']}: unavailable: {why}", flush=True)
        self.save()

    def save(self) -> None:
        content = {"kind": self.kind, "environment": describe(self.device), "rows": self.rows}
        write_json(self.path, content | {"unavailable": self.unavailable})


def earlier(path: Path, device: str) -> list[dict[str, Any]]:
    """Rows of an earlier call, if they are of this machine and these sources."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    same = all(
        content["environment"].get(fact) == describe(device).get(fact) for fact in ("device", "sources", "torch")
    )
    return content["rows"] if same else []
