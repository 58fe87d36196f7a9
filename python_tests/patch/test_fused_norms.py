"""fuse="norm": the RMSNorms of a stack come out of the adds before them, the final one too."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import void_ext
from void_ext.testing import assert_close, tolerance

OLD = int(transformers.__version__.split(".")[0]) < 5
LENGTH = 700  # of more elements than a CPU's few rows, whose norms wait for the end of the call


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def assert_near(got: torch.Tensor, expected: torch.Tensor, width: int) -> None:
    size = expected.abs().max()  # the tolerance is for logits of size 1
    assert_close(got / size, (expected / size).double(), tolerance("logits", torch.float32, width))


def run(model: Any) -> tuple[torch.Tensor, Counter[str]]:
    ids = torch.arange(LENGTH)[None] % 90
    with torch.no_grad(), Counting() as counting:
        logits = model(ids, use_cache=False).logits
    return logits, counting.calls


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma",
        pytest.param("gemma2", marks=pytest.mark.skipif(OLD, reason="transformers 4.57: its layers are not fused")),
    ],
)
def test_no_norm_of_the_stream_is_left_but_the_first(family: str, tiny: Any) -> None:
    model = tiny(family, scaled_norms=True)
    layers = model.config.num_hidden_layers
    expected, before = run(model)
    handle = void_ext.patch(model, fuse="norm")
    got, calls = run(model)
    # Four norms: those after the halves are of updates, not of the stream.
    of_updates = 2 * layers if family == "gemma2" else 0
    assert before["rsqrt"] == 2 * layers + 1 + of_updates
    assert calls["rsqrt"] == 1 + of_updates
    assert calls["add_rms_norm"] == 2 * layers
    assert_near(got, expected, model.config.hidden_size)
    trace = handle.trace
    assert trace is not None
    handle.unpatch()
    again, calls = run(model)
    assert torch.equal(again, expected)
    assert calls == before


@pytest.mark.parametrize("where", ["layer hook", "norm pre-hook", "norm pre-hook in place", "norm hook"])
def test_a_hook_before_the_final_norm_is_seen(where: str, tiny: Any) -> None:
    model = tiny("llama", scaled_norms=True)
    final, last = model.model.norm, model.model.layers[-1]

    def in_place(module: Any, args: Any) -> None:
        args[0].mul_(1.5)
        args[0][..., 0] = 3.0

    def hook() -> Any:
        if where == "layer hook":
            return last.register_forward_hook(lambda module, args, output: output.flip(-1))
        if where == "norm pre-hook":
            return final.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
        if where == "norm pre-hook in place":
            return final.register_forward_pre_hook(in_place)
        return final.register_forward_hook(lambda module, args, output: output.flip(-1))

    plain, _ = run(model)
    with hook():
        expected, _ = run(model)
    assert not torch.allclose(plain, expected, atol=1e-3)
    void_ext.patch(model, fuse="norm")
    with hook():
        got, _ = run(model)
    assert_near(got, expected, model.config.hidden_size)


def test_exit_gives_the_final_norm_another_stream(tiny: Any) -> None:
    model = tiny("llama", scaled_norms=True)
    with void_ext.patch(model, mode="exit", alpha=0.8):
        expected, _ = run(model)
    with void_ext.patch(model, mode="exit", alpha=0.8, fuse="norm"):
        got, _ = run(model)
    assert_near(got, expected, model.config.hidden_size)


def test_a_skipped_last_layer_leaves_the_final_norm_its_work(tiny: Any) -> None:
    model = tiny("llama", scaled_norms=True)
    layers = model.config.num_hidden_layers
    plan = void_ext.VoidPlan.from_layers(model, skip=[layers - 1])
    with void_ext.patch(model, mode="skip", plan=plan):
        expected, _ = run(model)
    with void_ext.patch(model, mode="skip", plan=plan, fuse="norm"):
        got, calls = run(model)
    assert calls["rsqrt"] == 2
    assert_near(got, expected, model.config.hidden_size)


@torch.no_grad()
def test_hidden_states_are_asked_for(tiny: Any) -> None:
    model = tiny("llama", scaled_norms=True)
    ids = torch.arange(LENGTH)[None] % 90
    expected = model(ids, use_cache=False, output_hidden_states=True)
    void_ext.patch(model, fuse="norm")
    got = model(ids, use_cache=False, output_hidden_states=True)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for left, right in zip((*got.hidden_states, got.logits), (*expected.hidden_states, expected.logits), strict=True):
        assert_near(left, right, model.config.hidden_size)


class Doubled(torch.nn.Module):
    """An adapter around a norm."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return 2 * self.norm(stream)


@pytest.mark.parametrize("which", ["input", "post", "final"])
def test_a_norm_that_is_replaced_later_is_called(which: str, tiny: Any) -> None:
    model = tiny("llama", scaled_norms=True)
    layer = model.model.layers[3]

    def replace() -> None:
        if which == "final":
            model.model.norm = Doubled(model.model.norm)
        else:
            name = "input_layernorm" if which == "input" else "post_attention_layernorm"
            setattr(layer, name, Doubled(getattr(layer, name)))

    plain, _ = run(model)
    handle = void_ext.patch(model, fuse="norm")
    replace()
    got, _ = run(model)
    assert handle.trace is not None
    handle.unpatch()
    expected, _ = run(model)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert_near(got, expected, model.config.hidden_size)


@pytest.mark.parametrize("layers", [[3], [2, 3], [5]])
@torch.no_grad()
def test_a_projected_layer_without_a_cache_keeps_its_norm_to_itself(layers: list[int], tiny: Any) -> None:
    model = tiny("llama", scaled_norms=True)
    ids = torch.arange(LENGTH)[None] % 90
    plan = void_ext.VoidPlan.from_layers(model, skip=layers, phase="prompt")  # PROJECT
    found = {}
    for fuse in ("add", "norm"):
        with void_ext.patch(model, mode="skip", plan=plan, fuse=fuse) as handle:
            logits = model(ids, use_cache=False).logits
            assert handle.trace is not None
            found[fuse] = logits, handle.trace.prompt.norms
    assert_near(found["norm"][0], found["add"][0], model.config.hidden_size)
    assert_near(found["norm"][1], found["add"][1], model.config.hidden_size)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_that_writes_before_the_final_norm_under_inference(when: str, tiny: Any) -> None:
    model = tiny("llama", scaled_norms=True)
    ids = torch.arange(LENGTH)[None] % 90

    def scale(module: Any, args: Any) -> None:
        args[0].mul_(1.5)
        args[0][..., 0] = 3.0

    with torch.inference_mode():
        with model.model.norm.register_forward_pre_hook(scale):
            expected = model(ids, use_cache=False).logits
        if when == "before":
            hook = model.model.norm.register_forward_pre_hook(scale)
        void_ext.patch(model, fuse="norm")
        if when == "after":
            hook = model.model.norm.register_forward_pre_hook(scale)
        with hook:
            got = model(ids, use_cache=False).logits
    assert_near(got, expected, model.config.hidden_size)


def test_a_final_norm_whose_class_has_another_forward_since(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", scaled_norms=True)
    norm = type(model.model.norm)
    own = norm.forward
    void_ext.patch(model, fuse="norm")
    run(model)
    monkeypatch.setattr(norm, "forward", lambda self, stream: 2 * own(self, stream))
    got, _ = run(model)
    void_ext.unpatch(model)
    expected, _ = run(model)
    assert_near(got, expected, model.config.hidden_size)
