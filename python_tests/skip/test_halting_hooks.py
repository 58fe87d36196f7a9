"""HaltPlan judges the stream as the next layer sees it: after the hooks of the layer that left it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext
from void_ext import HaltPlan


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize("place", [1, 3, 5])
@torch.no_grad()
def test_a_hook_changes_the_verdict(place: int, factor: float, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    policy = HaltPlan(alpha=0.4, protect_default=False)

    def executed() -> torch.Tensor:
        with void_ext.patch(model, mode="skip", policy=policy) as handle:
            model(input_ids=ids, attention_mask=mask)
        phase = handle.trace.prompt
        # The rule by hand, on the norms that the trace has: what comes after a token's first void does not run.
        void = phase.executed & ~phase.active(0.4)
        assert torch.equal(phase.executed, ~(void.cumsum(-1) - void.long()).bool())
        return phase.executed

    before = executed()
    model.model.layers[place].register_forward_hook(lambda module, args, output: output * factor)
    after = executed()
    if place < 5:
        assert not torch.equal(before, after)
