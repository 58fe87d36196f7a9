"""What one process and each of two do alike: the inputs, and what a run is judged by."""

from __future__ import annotations

from typing import Any

import torch

import void_ext

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 7, 8, 9, 11]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
LAYERS = 6


def policies(model: Any) -> dict[str, dict[str, Any]]:
    """name -> how to patch."""
    plan = void_ext.VoidPlan.from_layers(model, skip=[1], attention=[2], mlp=[4])
    return {
        "trace": {},
        "plan": {"mode": "skip", "plan": plan},
        "prompt": {"mode": "skip", "policy": void_ext.PromptPlan(protect_default=False)},
        "refresh": {"mode": "skip", "policy": void_ext.RefreshPlan(every=3, budget=2, protect_default=False)},
        "halt": {"mode": "skip", "policy": void_ext.HaltPlan(protect_default=False)},
    }


def run(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Generate while patched; tokens, trace and counters as plain values."""
    with void_ext.patch(model, **options) as handle:
        tokens = model.generate(
            input_ids=IDS, attention_mask=MASK, max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=95
        )
        trace, counters = handle.trace, handle.counters
    assert trace is not None
    phases = {"prompt": trace.prompt, "response": trace.response}
    return {
        "tokens": tokens.tolist(),
        "counters": None if counters is None else counters.to_dict(),
        **{
            f"{name}.{table}": getattr(phase, table).tolist()
            for name, phase in phases.items()
            for table in ("norms", "executed", "mask", "tokens")
        },
    }


def usage(model: Any, batches: list[torch.Tensor]) -> void_ext.UsageCount:
    count = void_ext.UsageCount(LAYERS)
    with void_ext.patch(model) as handle, torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
            assert handle.trace is not None
            count.add(handle.trace.prompt)
    return count


def batches() -> list[torch.Tensor]:
    """Of different sizes, so that a mean of means is another number."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 95, (1, length), generator=generator) for length in (3, 17, 5, 11)]
