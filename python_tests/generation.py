"""What makes generate() say, and end, what a test wants."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


class Forced:
    """A logits processor that makes row b generate rows[b], one token a step."""

    def __init__(self, rows: list[list[int]]):
        self.rows = rows
        self.step = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(self.rows):
            forced[row, tokens[min(self.step, len(tokens) - 1)]] = 0
        self.step += 1
        return forced


class _StopAt(StoppingCriteria):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return ids[:, -1] == self.token


def stop_at(token: int) -> StoppingCriteriaList:
    """Ends a row once it has generated ``token``."""
    return StoppingCriteriaList([_StopAt(token)])


class _EndOthers(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = torch.zeros(ids.shape[0], dtype=torch.bool)
        done[1:] = ids.shape[1] >= self.length
        return done


def end_others(length: int) -> StoppingCriteriaList:
    """Ends all rows but the first once the batch is ``length`` tokens long."""
    return StoppingCriteriaList([_EndOthers(length)])
