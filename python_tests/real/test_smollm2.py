"""The promises of modes ``trace`` and ``skip`` on real weights: SmolLM2-135M as Llama, as Mistral and as Qwen2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext
from void_ext import models
from void_ext.testing.compare import assert_bits_equal

QUESTION = "Which is larger, the Moon or the Earth? Answer in one sentence and say why."
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", params=[(family, dtype) for family in models.FAMILIES for dtype in DTYPES], ids=str)
def loaded(request: pytest.FixtureRequest) -> Any:
    family, dtype = request.param
    return models.smollm2(family, dtype=dtype)


def greedy(model: Any, ids: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Logits of the prompt and of each step after it."""
    output = model(input_ids=ids, use_cache=True)
    logits = [output.logits]
    for _ in range(steps):
        token = logits[-1][:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return logits


@torch.no_grad()
def test_logits_are_bitwise_equal(loaded: Any) -> None:
    model, tokenizer = loaded
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt").input_ids

    expected = greedy(model, ids, steps=6)
    with void_ext.patch(model) as handle:
        actual = greedy(model, ids, steps=6)
        assert "fused" in handle.describe()
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_bits_equal(ours, theirs, f"logits of step {step}")
    assert handle.trace is not None
    assert handle.trace.response.norms.shape == (1, 6, 31)
    usage = handle.trace.prompt.usage(0.8)
    assert 0.1 < float(usage.mean()) < 0.35  # the paper's rule calls most of SmolLM2's layers void at this alpha


@torch.no_grad()
def test_skipping_is_the_model_that_lacks_the_layers(loaded: Any) -> None:
    """Bit for bit: what remains runs on the same rows in the same way."""
    model, tokenizer = loaded
    skip = [0, 13, 14, 25]
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids

    with void_ext.patch(model, mode="skip", plan=void_ext.VoidPlan.from_layers(model, skip=skip)) as handle:
        actual = greedy(model, ids, steps=3)
        assert handle.counters is not None
        assert handle.counters.total.layers_skipped == 4 * len(skip)
    layers, config = model.model.layers, model.config
    kept = [layer for index, layer in enumerate(layers) if index not in skip]
    try:
        model.model.layers = torch.nn.ModuleList(kept)
        config.num_hidden_layers = len(kept)
        for index, layer in enumerate(kept):
            layer.self_attn.layer_idx = index
        expected = greedy(model, ids, steps=3)
    finally:
        model.model.layers, config.num_hidden_layers = layers, len(layers)
        for index, layer in enumerate(layers):
            layer.self_attn.layer_idx = index
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_bits_equal(ours, theirs, f"logits of step {step}")


class CountAllocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Sums the bytes of every new storage."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _holds(t)}
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if _holds(tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes += tensor.untyped_storage().nbytes()
        return output


def _holds(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > 0


@pytest.mark.slow
@torch.no_grad()
def test_tracing_4096_tokens_allocates_at_most_2_mb() -> None:
    model, _ = models.smollm2("llama", dtype=torch.float32)
    ids = torch.randint(3, 49000, (1, 4096), generator=torch.Generator().manual_seed(0))

    def allocated() -> int:
        with CountAllocations() as counter:
            model.model(input_ids=ids, use_cache=False)
        return counter.bytes

    before = allocated()
    with void_ext.patch(model) as handle:
        traced = allocated()
    assert handle.trace is not None
    assert handle.trace.prompt.norms.shape == (1, 4096, 31)
    assert 4096 * 31 * 4 <= traced - before <= 2_000_000


def test_batched_generation_on_real_text() -> None:
    model, tokenizer = models.smollm2("llama", dtype=torch.float32)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["The capital of France is", "Water boils at one hundred"], return_tensors="pt", padding=True)
    with void_ext.patch(model) as handle:
        output = model.generate(**batch, max_new_tokens=8, do_sample=False)
    expected = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert torch.equal(output, expected)
    trace = handle.trace
    assert trace is not None
    together = trace.prompt
    assert torch.equal(together.mask, batch.attention_mask.bool())
    # A row in a padded batch shows what it shows alone: float32 to tolerance.
    for row, text in enumerate(["The capital of France is", "Water boils at one hundred"]):
        with void_ext.patch(model) as alone, torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        assert alone.trace is not None
        real = together.norms[row][together.mask[row]]
        torch.testing.assert_close(real, alone.trace.prompt.norms[0], rtol=1e-4, atol=1e-3)
