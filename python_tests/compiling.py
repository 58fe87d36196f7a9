"""What tests of ``torch.compile`` share: how many graphs there are, and greedy decoding with a static cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

#: For tests that hold a compiled decode step to an eager one bit for bit: of grouped heads, transformers 5.24 packs the
#: queries in an eager step and not in a compiled one, so that attention's last bits differ, patched or not.
UNGROUPED = {"num_key_value_heads": 4}


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def decode(forward: Callable[..., Any], model: Any, ids: Tensor, steps: int = 4) -> Tensor:
    """Logits of greedy steps by ``forward`` after a prefill by ``model``."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    takes_positions = "cache_position" in inspect.signature(type(model).forward).parameters

    def positions(start: int, end: int) -> dict[str, Tensor]:
        # transformers 4.57 would ask a static cache for its length, which no graph can.
        return {"cache_position": torch.arange(start, end)} if takes_positions else {}

    length = ids.shape[1]
    logits = [model(input_ids=ids, past_key_values=cache, **positions(0, length)).logits[:, -1:]]
    for step in range(length, length + steps):
        token = logits[-1].argmax(-1)
        logits.append(forward(input_ids=token, past_key_values=cache, **positions(step, step + 1)).logits)
    return torch.cat(logits, 1)
