"""deepcopy, torch.save and save_pretrained of a patched model.

A copy is a patched model with a recording of its own, which is empty; void_ext.handle_of gives its handle. A saved
checkpoint holds weights alone.
"""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch

import void_ext
from void_ext import PromptPlan


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, saved], ids=["deepcopy", "torch.save"])
@pytest.mark.parametrize(
    ("family", "mode"), [("llama", "trace"), ("llama", "skip"), ("llama", "policy"), ("gpt2", "trace")]
)
def test_a_copy_is_patched(
    family: str, mode: str, make: Any, tiny: Any, greedy: Any, some_plan: Any, same_trace: Any
) -> None:
    model = tiny(family)
    plain = greedy(model)
    options: dict[str, Any] = {"mode": "skip"} if mode != "trace" else {}
    if mode == "skip":
        options["plan"] = some_plan(model)
    elif mode == "policy":
        options["policy"] = PromptPlan(budget=2, at_least=2)
    with void_ext.patch(model, **options) as handle:
        expected = greedy(model)
        trace = handle.trace
        twin = make(model)
        other = void_ext.handle_of(twin)
        assert other is not handle
        assert other.mode == handle.mode
        assert other.trace is None
        assert other.counters is None or other.counters.total.calls == 0
        assert torch.equal(greedy(twin), expected)
        assert other.trace is not None
        same_trace(other.trace, trace)
        # What the copy did is not in the original's trace or counters, and unpatching one leaves the other patched.
        twin.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
        assert handle.trace.prompt.positions == list(range(9))
        if handle.counters is not None:
            assert other.counters is not None
            assert other.counters.total.calls > handle.counters.total.calls
        void_ext.unpatch(twin)
        assert torch.equal(greedy(twin), plain)
        assert not any("forward" in module.__dict__ for module in twin.modules())
        assert torch.equal(greedy(model), expected)
    with pytest.raises(ValueError, match="is not patched"):
        void_ext.handle_of(model)


def test_a_checkpoint_is_the_unpatched_models(tiny: Any, tmp_path: Any, greedy: Any, some_plan: Any) -> None:
    model = tiny("llama")
    expected = greedy(model)
    model.save_pretrained(tmp_path / "plain")
    for name, options in (("traced", {}), ("skipping", {"mode": "skip", "plan": some_plan(model)})):
        with void_ext.patch(model, **options):
            greedy(model)
            model.save_pretrained(tmp_path / name)
            assert {key: id(value) for key, value in model.state_dict().items()}.keys() == model.state_dict().keys()
        for file in sorted((tmp_path / "plain").iterdir()):
            other = (tmp_path / name / file.name).read_bytes()
            if file.suffix == ".json":
                assert json.loads(other) == json.loads(file.read_bytes())
            else:
                assert other == file.read_bytes()
        assert torch.equal(greedy(type(model).from_pretrained(tmp_path / name)), expected)
