"""Sampling per item: the distribution of the paper's rule, the same answer in any batch, another with another seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from void_ext.evaluate.protocol.sampling import PER_ITEM, ItemSampler, with_item_sampling


def _sampler(rows: int, tokens: int = 1, seed: int = 0, **rule: float) -> tuple[torch.Tensor, ItemSampler]:
    context = torch.arange(rows)[:, None]
    rule = {"temperature": 0.5, "top_p": 0.9, **rule}
    return context, ItemSampler(context, torch.ones_like(context), tokens, seed=seed, **rule)


def test_the_distribution() -> None:
    rows = 20_000
    context, sampler = _sampler(rows)
    shares = torch.tensor([0.05, 0.4, 0.2, 0.3, 0.05])
    chosen = sampler(context, (0.5 * shares.log() + 3).expand(rows, -1)).argmax(-1)
    # 0.4, 0.3, 0.2 come first and reach 0.9; what follows starts beyond it (0.9 in float32 is a little more).
    expected = torch.tensor([0.0, 4 / 9, 2 / 9, 3 / 9, 0.0])
    found = torch.bincount(chosen, minlength=5) / rows
    deviation = (expected * (1 - expected) / rows).sqrt()
    assert (found - expected).abs().le(5 * deviation).all(), found
    assert found[0] == found[4] == 0


def test_one_token_is_left_and_it_is_likely() -> None:
    context, sampler = _sampler(64, top_p=0.3)
    scores = torch.randn(64, 50)
    left = sampler(context, scores)
    assert left.isfinite().sum(-1).eq(1).all()
    assert (left.argmax(-1) == scores.argmax(-1)).float().mean() > 0.3
    context, sampler = _sampler(64, top_p=1e-6)
    assert torch.equal(sampler(context, scores).argmax(-1), scores.argmax(-1))


def test_a_row_alone_and_padded_among_others_draws_the_same_numbers() -> None:
    prompts = [[5, 6, 7, 8], [7], [9, 9, 9]]
    padded = torch.tensor([[5, 6, 7, 8], [0, 0, 0, 7], [0, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]])
    rule: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 3}
    together = ItemSampler(padded, mask, 6, **rule)
    for step in range(6):
        scores = torch.randn(3, 40)
        grown = torch.cat([padded, torch.zeros(3, step, dtype=torch.long)], 1)
        rows = together(grown, scores)
        for index, prompt in enumerate(prompts):
            context = torch.tensor([prompt])
            alone = ItemSampler(context, torch.ones_like(context), 6, **rule)
            own = torch.cat([context, torch.zeros(1, step, dtype=torch.long)], 1)
            assert torch.equal(alone(own, scores[index : index + 1]), rows[index : index + 1])


def test_seeds_and_steps_and_prompts_differ() -> None:
    scores = torch.zeros(8, 10_000)
    context, sampler = _sampler(8, tokens=2, top_p=1.0)
    first = sampler(context, scores).argmax(-1)
    second = sampler(torch.cat([context, context], 1), scores).argmax(-1)
    other = _sampler(8, tokens=2, seed=1, top_p=1.0)[1](context, scores).argmax(-1)
    again = _sampler(8, tokens=2, top_p=1.0)[1](context, scores).argmax(-1)
    assert torch.equal(first, again)
    assert len(set(first.tolist())) == 8
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_only_where_it_was_asked_for() -> None:
    mask = torch.ones(1, 3)
    context = torch.ones(1, 3, dtype=torch.long)
    plain = {"attention_mask": mask, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    assert with_item_sampling(context, 8, plain, 0) == plain
    greedy = {"attention_mask": mask, "do_sample": False, PER_ITEM: True}
    assert with_item_sampling(context, 8, greedy, 0) == {"attention_mask": mask, "do_sample": False}
    asked = with_item_sampling(context, 8, {**plain, "top_k": 0, PER_ITEM: True}, 0)
    assert asked.keys() == {"attention_mask", "do_sample", "logits_processor"}
    assert asked["do_sample"] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores(dtype: torch.dtype) -> None:
    context, sampler = _sampler(4)
    left = sampler(context, torch.randn(4, 30).to(dtype))
    assert left.dtype == dtype
    assert left.isfinite().sum() == 4
