"""Unpatched means: attributes, hooks, forwards, config and generation config exactly as found."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import void_ext
from void_ext.patching import handle as handle_module


def state(model: Any) -> dict[str, Any]:
    """Everything patching could leave behind, by identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key.startswith("_") and isinstance(value, dict):
                found[f"{name}.{key}"] = tuple((k, id(v)) for k, v in value.items())
            else:
                found[f"{name}.{key}"] = id(value)
        found[f"{name} forward"] = type(module).forward
    found["config"] = model.config.to_json_string()
    found["generation_config"] = model.generation_config.to_json_string()
    return found


@pytest.mark.parametrize("mode", ["trace", "exit"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_exactly_as_found(family: str, mode: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny(family)
    ids, mask = padded_batch
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    before = state(model)
    for fuse in ("add", "norm"):
        handle = void_ext.patch(model, mode=mode, fuse=fuse)
        assert state(model) != before
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        void_ext.unpatch(model)
        assert state(model) == before
        assert handle.trace is not None
        with pytest.raises(ValueError, match="unpatched already"):
            handle.unpatch()


def test_what_others_put_on_instances_is_kept(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    original = model.generate
    calls: list[int] = []

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.generate = generate
    with void_ext.patch(model) as handle:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert handle.trace is not None
    assert model.generate is generate
    assert calls == [1]


def test_context_manager_unpatches_on_an_exception(tiny: Any) -> None:
    model = tiny("llama")
    before = state(model)
    with pytest.raises(KeyError), void_ext.patch(model):
        raise KeyError("something else went wrong")
    assert state(model) == before


def test_context_manager_after_an_explicit_unpatch(tiny: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model) as handle:
        handle.unpatch()
    with pytest.raises(ValueError, match="unpatched already; patch it again"), handle:
        pass


@torch.no_grad()
def test_what_others_put_over_ours_stays(tiny: Any, padded_batch: Any) -> None:
    """accelerate wraps a layer's forward; unpatching must not take that away, and what it wraps must be inert."""
    model = tiny("llama")
    ids, mask = padded_batch
    layer = model.model.layers[2]
    handle = void_ext.patch(model)
    ours = layer.forward
    calls: list[int] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    layer.forward = wrapped
    handle.unpatch()
    assert layer.forward is wrapped
    expected = tiny("llama")(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert calls == [1]


@pytest.mark.parametrize("fails_at", range(0, 10))
def test_nothing_half_patched_is_left(fails_at: int, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = state(model)
    real = handle_module.InstanceAttribute
    made: list[Any] = []

    def failing(*args: Any) -> Any:
        if len(made) == fails_at:
            raise MemoryError("no more")
        made.append(args)
        return real(*args)

    monkeypatch.setattr(handle_module, "InstanceAttribute", failing)
    with pytest.raises(MemoryError):  # six forwards and at least four methods and marks
        void_ext.patch(model)
    assert state(model) == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_exception_inside_a_forward(family: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny(family)
    ids, mask = padded_batch
    layers = model.model.layers if family == "llama" else model.transformer.h
    before = state(model)
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    handle = void_ext.patch(model)
    fail = [0]

    def trap(module: Any, args: Any) -> None:
        fail[0] += 1
        if fail[0] == 3:
            raise RuntimeError("the machine is on fire")

    hook = layers[3].register_forward_pre_hook(trap)
    with pytest.raises(RuntimeError, match="on fire"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    hook.remove()
    assert handle.trace is not None
    assert handle.trace.prompt.positions == list(range(9))
    assert handle.trace.response.positions == [9]
    # A layer called on its own now is not mistaken for a part of the broken forward.
    assert handle._recorder.call is None
    actual = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(actual, expected)
    assert handle.trace.response.positions == [9, 10, 11]
    handle.unpatch()
    assert state(model) == before


def test_copies_and_files_of_a_patched_model(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    with void_ext.patch(model) as handle, torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        pickled = pickle.loads(pickle.dumps(model))
        trace = handle.trace
        for other in (copied, loaded, pickled):
            assert torch.equal(other(input_ids=ids[:, :5], attention_mask=mask[:, :5]).logits, expected[:, :5])
            void_ext.unpatch(other)
            assert not any("forward" in module.__dict__ for module in other.modules())
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
        # What the copies did is not in the original's trace, and the original is still patched.
        assert trace is not None
        assert trace.prompt.positions == list(range(9))
        model(input_ids=ids[:, :4], attention_mask=mask[:, :4])
        assert handle.trace is not None
        assert handle.trace.prompt.positions == list(range(4))


def test_saving_a_patched_model(tiny: Any, tmp_path: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for (name, ours), (_, theirs) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
