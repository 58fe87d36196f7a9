"""Which layers, or halves, to go without by what tokens showed: the definition, in loops over Python numbers."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

#: what one token showed: norms before the first unit and after each, which units ran, norms of their updates
Token = tuple[list[float], list[bool], list[float]]


def voids_of(norms: list[float], ran: list[bool], alpha: float) -> list[bool]:
    values = torch.tensor(norms, dtype=torch.float32)
    found, before = [], []
    for unit in range(len(norms) - 1):
        delta = values[unit + 1] - values[unit]
        earlier = torch.stack(before) if before else torch.zeros(1)
        spread = earlier.max() - earlier.min()  # unlike Python's, they keep a NaN
        found.append(ran[unit] and bool(delta < torch.tensor(alpha) * spread))
        if ran[unit]:
            before.append(delta)
    return found


def signal_of(signal: str, before: float, after: float, update: float) -> float:
    if signal == "abs_delta":
        return abs(after - before)
    if signal == "relative_update":
        return update / before
    return 1 - (before**2 + after**2 - update**2) / (2 * before * after)


def units_off(
    tokens: list[Token],
    protected: Collection[int],
    *,
    signal: str = "delta",
    alpha: float = 0.8,
    most: int | None = None,
    least: int = 0,
) -> set[int]:
    """Units to go without: those void for more than half of the tokens, or with ``most`` the first by rank."""
    ranked = []
    for unit in range(len(tokens[0][1]) if tokens else 0):
        seen = [token for token in tokens if token[1][unit]]
        if not seen or unit in protected:
            continue
        change = math.fsum(abs(n[unit + 1] - n[unit]) for n, _, _ in seen) / len(seen)
        if signal == "delta":
            count = sum(voids_of(n, ran, alpha)[unit] for n, ran, _ in seen)
            wanted = 2 * count > len(seen) if most is None else count > 0
            ranked.append((-count / len(seen), change, unit, wanted))
        else:
            values = [signal_of(signal, n[unit], n[unit + 1], u[unit]) for n, _, u in seen]
            ranked.append((math.fsum(values) / len(values), change, unit, True))
    ranked.sort()
    taken = [entry for entry in ranked if entry[3]][:most]
    return {entry[2] for entry in taken} | {entry[2] for entry in ranked[:least]}
