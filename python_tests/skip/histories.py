"""What policies are shown, made up, and what by definition they must make of it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from python_tests.skip.definition import Token, units_off
from void_ext import History

LAYERS = 9
DEFAULT = {0, 1, LAYERS - 1}  # protected
SIGNALS = ["delta", "abs_delta", "relative_update", "cosine"]


def history(rows: int = 3, prompt: int = 7, response: int = 0, seed: int = 0, padded: bool = True) -> History:
    """Random walks of vectors, so that updates belong to the norms. Row 1 has pads on the left, row 2 nothing else."""
    generator = torch.Generator().manual_seed(seed)
    length = prompt + response
    steps = torch.randn(rows, length, LAYERS + 1, 6, generator=generator)
    scale = torch.rand(LAYERS + 1, 1, generator=generator) * 1.5 + 0.05
    stream = (steps * scale).cumsum(2) + 1
    mask = torch.ones(rows, length, dtype=torch.bool)
    if padded and rows > 1:
        mask[1, :3] = False
    if padded and rows > 2:
        mask[2] = False
    return History(
        stream.norm(dim=-1),
        torch.ones(rows, length, LAYERS, dtype=torch.bool),
        mask,
        stream.diff(dim=2).norm(dim=-1),
        [0] * prompt + [1] * response,
    )


def tokens_of(past: History, row: int, positions: Any) -> list[Token]:
    assert past.updates is not None
    return [
        (past.norms[row, t].tolist(), past.executed[row, t].tolist(), past.updates[row, t].tolist())
        for t in positions
        if past.mask[row, t]
    ]


def together(tokens: list[Token]) -> list[Token]:
    """One token whose norms are those of all of them that ran every layer, taken together."""
    tokens = [token for token in tokens if all(token[1])]
    if not tokens:
        return []
    pooled = [
        [math.sqrt(math.fsum(token[part][i] ** 2 for token in tokens)) for i in range(LAYERS + 1 - part // 2)]
        for part in (0, 2)
    ]
    # Norms are kept in float32.
    norms, updates = (torch.tensor(values).tolist() for values in pooled)
    return [(norms, [True] * LAYERS, updates)]


def expected_skip(tokens: list[Token], **options: Any) -> list[bool]:
    """Of each layer, whether these tokens speak for going without it."""
    off = units_off(tokens, DEFAULT, **options)
    return [layer in off for layer in range(LAYERS)]


def expected_rows(past: History, granularity: str, positions: Any, **options: Any) -> list[list[bool]]:
    rows = [tokens_of(past, row, positions) for row in range(past.rows)]
    if granularity == "batch":
        return [expected_skip(together(list(itertools.chain(*rows))), **options)] * past.rows
    if granularity == "sequence":
        rows = [together(tokens) for tokens in rows]
    return [expected_skip(tokens, **options) for tokens in rows]
