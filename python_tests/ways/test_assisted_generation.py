"""Assisted generation: candidates that were not taken leave no rows, whoever drafted them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext

SETTINGS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}  # 4.57 takes no minimum with a draft


@pytest.mark.parametrize("who", ["another", "itself", "lookup"])
@pytest.mark.parametrize("skips", [False, True])
def test_tokens_and_rows(skips: bool, who: str, tiny: Any, padded_batch: Any, some_plan: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1].repeat(1, 2)  # a prompt that repeats itself, to be looked up in
    draft = {
        "another": {"assistant_model": tiny("llama", seed=3)},
        "itself": {"assistant_model": model},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[who]
    plain = model.generate(ids, **SETTINGS, **draft)
    options = {"mode": "skip", "plan": some_plan(model)} if skips else {}
    with void_ext.patch(model, **options) as handle:
        usual = model.generate(ids, **SETTINGS)
        trace = handle.trace
        handle.reset()
        found = model.generate(ids, **SETTINGS, **draft)
    assert torch.equal(found, usual)
    if not skips:
        assert torch.equal(found, plain)
    assert trace is not None
    assert handle.trace is not None
    for phase in ("prompt", "response"):
        one, other = getattr(handle.trace, phase), getattr(trace, phase)
        real = slice(None), slice(0, other.mask.shape[1])
        assert bool(other.mask.all())
        assert torch.equal(one.tokens[real], other.tokens)
        assert bool(one.mask[real].all())
        assert not one.mask[:, other.mask.shape[1] :].any()
        assert torch.equal(one.executed[real], other.executed)
        torch.testing.assert_close(one.norms[real], other.norms, rtol=2e-5, atol=1e-5)


def test_a_patched_assistant(tiny: Any, padded_batch: Any) -> None:
    """An assistant is a model like any other: tokens stay, and its own forwards are in its own trace."""
    model, assistant = tiny("llama"), tiny("llama", seed=3)
    ids = padded_batch[0][:1]
    expected = model.generate(ids, **SETTINGS, assistant_model=assistant)
    with void_ext.patch(assistant) as handle:
        assert torch.equal(model.generate(ids, **SETTINGS, assistant_model=assistant), expected)
    assert handle.trace is not None
    assert handle.trace.prompt.norms.shape[-1] == 7
