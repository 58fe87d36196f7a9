"""Plans searched for SmolLM2 on a small text are at least as good there as every ranking's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext
from void_ext import models
from void_ext.search import Settings, costs_of, default_text, find_plans, passages

pytestmark = pytest.mark.slow


@torch.no_grad()
def logs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(row[None], use_cache=False).logits[:, :-1] for row in ids]).log_softmax(-1)


@pytest.mark.parametrize(("kinds", "budgets"), [(("layers",), (2, 4, 6, 9)), (("layers", "halves"), (2,))])
def test_the_saved_plan_is_as_good_on_its_text_as_every_ranking(
    kinds: tuple[str, ...], budgets: tuple[int, ...]
) -> None:
    model, tokenizer = models.smollm2()
    texts = passages(tokenizer, default_text(), None, sequences=3, length=48)
    ids = texts[0].ids
    settings = Settings(budgets=budgets, kinds=kinds, seeds=1)
    told = costs_of(model, settings, 3)
    found = find_plans(model, texts, settings)
    assert sum(found.evaluations.values()) <= told.total
    assert found.evaluations["trace"] == 30
    whole = sum((27 - step) * (29 - step) for step in range(budgets[-1]))
    assert found.evaluations["greedy, layers"] <= whole / 3
    with void_ext.patch(model, updates=True) as handle, torch.no_grad():
        traces = []
        for row in ids:
            model(row[None], use_cache=False, logits_to_keep=1)
            traces.append(handle.trace)
    dense = logs(model, ids)

    def divergence(plan: void_ext.VoidPlan) -> float:
        with void_ext.patch(model, mode="skip", plan=plan):
            return float((dense.exp() * (dense - logs(model, ids))).sum(-1).double().mean())

    for budget, plan in found.plans.items():
        ours = divergence(plan)
        assert ours == pytest.approx(found.frontier.best(budget).calibration.divergence, rel=1e-3)
        for signal in ("delta", "abs_delta", "relative_update", "cosine"):
            other = void_ext.VoidPlan.from_trace(traces, model, signal=signal, budget=budget, at_least=budget)
            assert ours <= divergence(other) * (1 + 1e-4), (budget, signal)
