"""Which rows of a trace count: no padding, nothing after a row's end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext
from python_tests.generation import Forced, stop_at

EOS = 2
pytestmark = pytest.mark.usefixtures("ways_of_taking_norms")


def test_rows_end_before_their_eos(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    rows = [[5, 6, EOS], [5, 6, 7, 8, 9, 10], [EOS]]
    with void_ext.patch(model) as handle:
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, logits_processor=[Forced(rows)])
    assert output.shape[1] == 15
    trace = handle.trace
    assert trace is not None
    assert trace.response.mask.tolist() == [
        [True, True, False, False, False],
        [True, True, True, True, True],
        [False, False, False, False, False],
    ]
    # An eos in the prompt (chat templates end turns with it) ends nothing.
    assert torch.equal(trace.prompt.mask, mask.bool())
    usage = trace.response.usage()
    active = trace.response.active()
    real = torch.cat([active[0, :2], active[1]])
    torch.testing.assert_close(usage, real.float().mean(0))
    per_row = trace.response.usage(per="row")
    torch.testing.assert_close(per_row[1], active[1].float().mean(0))
    assert bool(per_row[2].isnan().all())


def test_the_effective_eos_set(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    rows = [[5, 40, 6, 41, 7, 8], [5, 6, EOS, 40, 8, 8], [5, 6, 7, 8, 41, 8]]

    def run(**extra: Any) -> list[int]:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, logits_processor=[Forced(rows)], **extra)
        assert handle.trace is not None
        return handle.trace.response.mask.sum(1).tolist()

    with void_ext.patch(model) as handle:
        assert run(eos_token_id=[40, 41]) == [1, 3, 4]
        assert run(eos_token_id=40) == [1, 3, 5]
        config = type(model.generation_config)(eos_token_id=[40, 41], pad_token_id=0, max_new_tokens=6)
        model.generate(ids, config, attention_mask=mask, logits_processor=[Forced(rows)])
        assert handle.trace is not None
        assert handle.trace.response.mask.sum(1).tolist() == [1, 3, 4]
        model.generation_config.eos_token_id = 7
        assert run() == [4, 5, 2]


@pytest.mark.parametrize(
    "options", [{}, {"mode": "skip", "policy": void_ext.PromptPlan(budget=2)}], ids=["trace", "skip"]
)
def test_ends_of_rows_without_a_cache(options: dict[str, Any], tiny: Any, padded_batch: Any) -> None:
    """There each call runs all tokens again, those of ended rows before their end among them."""
    model = tiny("llama")
    ids, mask = padded_batch
    rows = [[5, 6, EOS], [5, 6, 7, 8, 9, 10], [EOS]]
    found = []
    with void_ext.patch(model, **options) as handle:
        for use_cache in (True, False):
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=6,
                use_cache=use_cache,
                logits_processor=[Forced(rows)],
            )
            trace = handle.trace
            assert trace is not None
            found.append((trace.prompt.mask.tolist(), trace.response.mask.tolist()))
            assert not bool(trace.prompt.usage(per="row").isnan().any())
    assert found[0] == found[1]
    assert found[0][0] == mask.bool().tolist()


def test_rows_ended_by_a_criterion(tiny: Any, padded_batch: Any) -> None:
    """A row alone ends before its last token is consumed; in a batch it must say the same."""
    model = tiny("llama")
    ids, mask = padded_batch
    rows = [[5, 6, 33], [5, 6, 7, 8, 9, 10], [33]]
    criteria = stop_at(33)
    with void_ext.patch(model) as handle:
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            stopping_criteria=criteria,
            logits_processor=[Forced(rows)],
        )
        assert handle.trace is not None
        together = handle.trace.response.mask.sum(1).tolist()
        alone = []
        for row in range(3):
            model.generate(
                input_ids=ids[row : row + 1],
                attention_mask=mask[row : row + 1],
                max_new_tokens=6,
                stopping_criteria=criteria,
                logits_processor=[Forced(rows[row : row + 1])],
            )
            alone.append(int(handle.trace.response.mask.sum()))
        # With embeddings for a prompt, generate() returns the new tokens alone.
        model.generate(
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=mask,
            max_new_tokens=6,
            stopping_criteria=criteria,
            logits_processor=[Forced(rows)],
        )
        assert handle.trace.response.mask.sum(1).tolist() == together
    assert together == alone == [2, 5, 0]


@torch.no_grad()
def test_right_padding_and_prepared_masks(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    right = mask.flip(1)
    with void_ext.patch(model) as handle:
        model(input_ids=ids.flip(1), attention_mask=right)
        assert handle.trace is not None
        assert torch.equal(handle.trace.prompt.mask, right.bool())
        allowed = torch.ones(9, 9, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
        model(input_ids=ids, attention_mask=allowed)
        assert torch.equal(handle.trace.prompt.mask, mask.bool())
        additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        model(input_ids=ids, attention_mask=additive)
        assert torch.equal(handle.trace.prompt.mask, mask.bool())


@torch.no_grad()
def test_real_tokens_tell_padding_where_no_mask_is_given(tiny: Any) -> None:
    """Right padding without a mask: the model is called as before, and only the tokens said to be real count."""
    model = tiny("llama")
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    expected = model(ids).logits
    with void_ext.patch(model) as handle:
        with handle.real_tokens(real):
            logits = model(ids).logits
            assert handle.trace is not None
            assert torch.equal(handle.trace.prompt.mask, real)
            model(ids, attention_mask=torch.ones_like(ids))  # a mask of the call's own comes first
            assert bool(handle.trace.prompt.mask.all())
            model(ids[:1])  # another shape
            assert bool(handle.trace.prompt.mask.all())
        model(ids)
        assert bool(handle.trace.prompt.mask.all())
        with (
            pytest.raises(ValueError, match=r"mask: expected a tensor \[batch, tokens\], got shape \(7,\)"),
            handle.real_tokens(real[0]),
        ):
            pass
    assert torch.equal(logits, expected)
