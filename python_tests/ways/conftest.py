"""The ways of running a model, with two questions each: are the tokens the model's own, and is the trace right?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import void_ext
from void_ext import VoidPlan
from void_ext.testing.compare import assert_bits_equal

NEW = 6


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by sharing work; on a busy machine they lose minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def greedy(padded_batch: Any) -> Callable[..., Any]:
    """``greedy(model, …)``: six new tokens for each row of the padded batch."""

    def run(model: Any, **settings: Any) -> Any:
        ids, mask = padded_batch
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **settings}
        return model.generate(input_ids=ids, attention_mask=mask, **settings)

    return run


@pytest.fixture
def usual_trace(greedy: Any) -> Callable[..., Any]:
    """The trace of a plain generate() of a copy of ``model``, patched in the plain way with the same options."""

    def run(model: Any, **options: Any) -> Any:
        with void_ext.patch(copy.deepcopy(model), **options) as handle:
            greedy(handle._stack.model)
        return handle.trace

    return run


@pytest.fixture
def some_plan() -> Callable[..., VoidPlan]:
    """A plan with every kind of action: layer 2 off, and halves; K and V alone where ``phase`` is the prompt."""

    def make(model: Any, phase: str = "both") -> VoidPlan:
        return VoidPlan.from_layers(model, skip=[2], attention=[3], mlp=[4], phase=phase)

    return make


@pytest.fixture
def tokenizer() -> Any:
    """Words ``w3`` … ``w95`` for the tokens of the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 96)}}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture
def same_trace() -> Callable[..., None]:
    """``same_trace(one, other)``: the same rows, phases, masks and tokens, and the same norms bit for bit."""

    def check(one: Any, other: Any, exact: bool = True) -> None:
        for name in ("prompt", "response"):
            left, right = getattr(one, name), getattr(other, name)
            assert left.positions == right.positions
            assert torch.equal(left.mask, right.mask)
            assert torch.equal(left.tokens, right.tokens)
            assert torch.equal(left.executed, right.executed)
            if exact:
                assert_bits_equal(left.norms, right.norms, f"norms of the {name}")
            else:
                torch.testing.assert_close(left.norms, right.norms, rtol=2e-5, atol=1e-5)

    return check
