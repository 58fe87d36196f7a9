"""What a decode step on a CPU pays for being watched, in things that can be counted: calls of Python, and torch's ops.

Between two layers the weights of one pass through the caches, and whatever runs then is read from memory: so time goes
with the amount of code, and that is kept from growing here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import void_ext
from void_ext.patching import call

_OURS = void_ext.__path__[0]

pytestmark = pytest.mark.skipif(not call.tensors_visible(), reason="this torch does not show its tensors")


class CountOps(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def decode_step(model: Any) -> Callable[[], object]:
    """The next step of a response, of one row and without a mask."""
    cache = DynamicCache(config=model.config)

    def step(length: int = 1) -> object:
        return model(input_ids=torch.ones(1, length, dtype=torch.int64), past_key_values=cache)

    step(8)
    for _ in range(2):
        step()
    return step


def python_calls(step: Callable[[], object]) -> int:
    count = 0

    def look(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(_OURS)

    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def ops(step: Callable[[], object]) -> int:
    with CountOps() as counter:
        step()
    return counter.count


def options(mode: str, model: Any) -> dict[str, Any]:
    return {} if mode == "trace" else {"mode": mode, "plan": void_ext.VoidPlan.from_layers(model)}


@pytest.mark.parametrize(("mode", "most"), [("trace", 40), ("skip", 56)])
@torch.inference_mode()
def test_one_python_call_a_layer(mode: str, most: int, tiny: Any) -> None:
    found = []
    for layers in (6, 9):
        model = tiny("llama", layers=layers)
        with void_ext.patch(model, **options(mode, model)):
            found.append(python_calls(decode_step(model)))
    # transformers 4.57 leaves out arguments of a layer, which are filled in.
    each = 2 if transformers.__version__.startswith("4.") else 1
    assert found[1] - found[0] == 3 * each
    assert found[0] <= most + 6 * each


@pytest.mark.parametrize("mode", ["trace", "skip"])
@torch.inference_mode()
def test_no_op_is_added(mode: str, tiny: Any) -> None:
    model = tiny("llama")
    before = ops(decode_step(model))
    with void_ext.patch(model, **options(mode, model)):
        assert ops(decode_step(model)) == before
