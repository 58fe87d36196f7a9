"""Training, with gradient checkpointing or without: the patch is inactive, and awake again in eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import void_ext
from void_ext.testing.compare import assert_bits_equal


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(("family", "skips"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_a_step_of_training(
    family: str, skips: bool, reentrant: bool | None, tiny: Any, padded_batch: Any, some_plan: Any
) -> None:
    """``reentrant`` None: no checkpointing. Recomputing a layer in the backward pass must record nothing either."""
    model, ids = tiny(family), padded_batch[0].clamp_min(3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model.train()
    expected = gradients(model, ids)
    options = {"mode": "skip", "plan": some_plan(model)} if skips else {}
    with void_ext.patch(model, **options) as handle:
        found = gradients(model, ids)
        for name, gradient in found.items():
            assert_bits_equal(gradient, expected[name], name)
        assert handle.trace is None
        if handle.counters is not None:
            assert handle.counters.total.calls == 0
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
        assert handle.trace is not None
        assert handle.trace.prompt.positions == list(range(9))
        model.train()
        gradients(model, ids)
        assert handle.trace.prompt.positions == list(range(9))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_in_eval_mode(reentrant: bool, tiny: Any, padded_batch: Any) -> None:
    """Recomputed while the gradients are taken, when no call is open: the layers run their own forward, bit for bit."""
    model, ids = tiny("llama"), padded_batch[0].clamp_min(3)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = checkpoint(
            lambda x: model(inputs_embeds=x, use_cache=False).logits, embeddings, use_reentrant=reentrant
        )
        logits.float().logsumexp(-1).sum().backward()
        assert embeddings.grad is not None
        return embeddings.grad

    expected = gradient()
    with void_ext.patch(model) as handle:
        assert_bits_equal(gradient(), expected, "gradient of the embeddings")
    assert handle.trace is not None
    assert handle.trace.prompt.norms.shape == (3, 9, 7)
