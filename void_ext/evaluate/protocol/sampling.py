"""Sampling in which an answer hangs on its own question and the seed alone, not on the other rows of its batch.

transformers draws the next tokens of a whole batch from one generator: another batch size, another order, another
answer. Here every row has its own random numbers, made of the seed and the row's prompt, one a token; the token is
where the cumulative probability passes the number. Same model, prompt and seed: same answer in any batch, up to the
rounding of matrix products of other shapes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

if TYPE_CHECKING:
    from torch import Tensor

PER_ITEM = "seed_per_item"
"""In a task's ``generation_kwargs``: True asks for this kind of sampling."""


class ItemSampler(LogitsProcessor):
    r"""Top-p sampling at a temperature; hands ``generate`` scores in which one token of each row is left.

    ``p = softmax(scores / T)``; of the tokens in falling order of p those stay before which the sum is at most
    ``top_p`` (the paper's code has the same rule); the token is the first, in the order of the vocabulary, at which
    their cumulative sum passes u times their sum, u uniform in [0, 1).

    Args:
        context: ``(rows, tokens)`` int64, the padded prompts.
        attention_mask: the same shape, 0 at padding.
        new_tokens: how many tokens will be drawn at most.
        seed: of the run.

    Cost: one sort and two cumulative sums over ``(rows, vocabulary)`` a token; nothing is read back from the device
    after the first call.
    """

    def __init__(
        self, context: Tensor, attention_mask: Tensor, new_tokens: int, *, temperature: float, top_p: float, seed: int
    ):
        self._temperature, self._top_p = temperature, top_p
        self._prompt = context.shape[1]
        drawn = [
            _uniform([token for token, real in zip(row, mask, strict=True) if real], new_tokens, seed)
            for row, mask in zip(context.tolist(), attention_mask.tolist(), strict=True)
        ]
        self._drawn = torch.tensor(np.stack(drawn), device=context.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        u = self._drawn[:, input_ids.shape[1] - self._prompt, None]
        p = torch.softmax(scores.float() / self._temperature, dim=-1)
        falling, index = torch.sort(p, dim=-1, descending=True, stable=True)
        beyond = falling.cumsum(-1) - falling > self._top_p
        kept = torch.zeros_like(p).scatter_(-1, index, falling.masked_fill(beyond, 0.0))
        cumulative = kept.double().cumsum(-1)
        total = cumulative[:, -1:]
        wanted = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def with_item_sampling(context: Tensor, max_length: int, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """``settings`` for ``model.generate`` in which :data:`PER_ITEM`, where asked for, is carried out."""
    settings = dict(settings)
    if not settings.pop(PER_ITEM, False) or not settings.get("do_sample"):
        return settings
    sampler = ItemSampler(
        context,
        settings["attention_mask"],
        max_length - context.shape[1],
        temperature=float(settings.pop("temperature")),
        top_p=float(settings.pop("top_p")),
        seed=seed,
    )
    settings.pop("top_k", None)
    return {**settings, "do_sample": False, "logits_processor": LogitsProcessorList([sampler])}


def is_drawn_in_order(settings: Mapping[str, Any]) -> bool:
    """Whether these settings sample with torch's one generator, where answers hang on what was drawn before them."""
    sampled = settings.get("do_sample")
    if sampled is None:  # as lm-eval decides
        sampled = float(settings.get("temperature", 0.0)) > 0
    return bool(sampled) and not settings.get(PER_ITEM)


def _uniform(tokens: list[int], count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    digest = hashlib.sha256(np.array([seed, *tokens], dtype="<i8").tobytes()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little"))).random(count)
