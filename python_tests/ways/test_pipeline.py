"""``transformers.pipeline`` around a patched model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import void_ext

TEXTS = ["w5 w6 w7 w8", "w9 w10 w11 w12 w13 w14"]


def answers(model: Any, tokenizer: Any, **settings: Any) -> list[list[int]]:
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    found = pipeline(TEXTS, batch_size=2, return_tensors=True, truncation=False, **settings)
    return [answer[0]["generated_token_ids"] for answer in found]


@pytest.mark.parametrize("skips", [False, True])
def test_batch_of_texts(skips: bool, tiny: Any, tokenizer: Any, some_plan: Any) -> None:
    model = tiny("llama")
    plain = answers(model, tokenizer)
    options = {"mode": "skip", "plan": some_plan(model)} if skips else {}
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with void_ext.patch(model, **options) as handle:
        found = answers(model, tokenizer)
        trace = handle.trace
        direct = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            **{"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False},
        )
    expected = direct.tolist() if skips else plain
    assert [row[-11:] for row in found] == [row[-11:] for row in expected]
    assert trace is not None
    assert torch.equal(trace.prompt.tokens, batch["input_ids"])
    assert torch.equal(trace.prompt.mask, batch["attention_mask"].bool())
    assert trace.response.positions == [6, 7, 8, 9]
    assert trace.response.tokens.tolist() == [row[-5:-1] for row in found]
    assert trace.response.mask.all()
    assert bool(trace.response.executed.all()) is not skips


def test_a_text_that_ends_before_the_other(tiny: Any, tokenizer: Any) -> None:
    """What the pipeline tells generate() reaches the trace: a row has no real tokens from its end on."""
    model = tiny("llama")
    first, second = (row[-5:] for row in answers(model, tokenizer))
    assert first[2] not in [*first[:2], *second]
    with void_ext.patch(model) as handle:
        answers(model, tokenizer, min_new_tokens=None, eos_token_id=first[2])
    assert handle.trace is not None
    assert handle.trace.response.mask.tolist() == [[True, True, False, False], [True] * 4]
