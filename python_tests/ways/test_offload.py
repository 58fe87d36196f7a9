"""accelerate's device maps: weights on the CPU and on disk, brought to a layer by hooks around its forward."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import void_ext
from void_ext import VoidPlan
from void_ext.patching import call, fused

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")


def on_disk(*layers: int) -> dict[str, str]:
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return {
        **dict.fromkeys(parts, "cpu"),
        **{f"model.layers.{i}": "disk" if i in layers else "cpu" for i in range(6)},
    }


def spread(model: Any, folder: Any, **settings: Any) -> Any:
    where = {"device_map": on_disk(1, 2, 4), "main_device": "cpu", "offload_dir": str(folder)}
    return accelerate.dispatch_model(model, **where, force_hooks=True, **settings)


@pytest.mark.parametrize("way", ["one device", "auto", "disk"])
@pytest.mark.parametrize("skips", [False, True])
def test_loaded_with_a_device_map(
    skips: bool, way: str, tiny: Any, greedy: Any, some_plan: Any, usual_trace: Any, same_trace: Any, tmp_path: Any
) -> None:
    whole = tiny("llama")
    whole.save_pretrained(tmp_path / "model")
    expected = greedy(whole)
    settings: dict[str, Any] = {
        "one device": {"device_map": {"": "cpu"}},
        "auto": {"device_map": "auto"},
        "disk": {"device_map": on_disk(1, 2, 4), "offload_folder": str(tmp_path / "offload")},
    }[way]
    model = type(whole).from_pretrained(tmp_path / "model", **settings)
    assert any(p.device.type == "meta" for p in model.parameters()) is (way == "disk")
    options = {"mode": "skip", "plan": some_plan(whole, "prompt")} if skips else {}
    unread = pytest.warns(UserWarning, match="norm weights could not be read")
    with unread if skips and way == "disk" else contextlib.nullcontext():
        handle = void_ext.patch(model, **options)
    with handle:
        found = greedy(model)
        assert "fused (fuse='add')" in handle.describe()
    if skips:
        with void_ext.patch(whole, mode="skip", plan=some_plan(whole, "prompt")):
            expected = greedy(whole)
    assert torch.equal(found, expected)
    assert handle.trace is not None
    same_trace(handle.trace, usual_trace(whole, **options))
    void_ext.patch(model).unpatch()
    assert torch.equal(greedy(model), greedy(whole))


@pytest.mark.parametrize(("family", "fuse"), [("llama", "add"), ("llama", "norm"), ("gpt2", "add")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_dispatched_by_hand(
    when: str, family: str, fuse: str, tiny: Any, greedy: Any, usual_trace: Any, same_trace: Any, tmp_path: Any
) -> None:
    """``fuse="norm"``: the weight of the norm that an add could take along comes with its layer, too late for that."""
    model = tiny(family)
    expected, wanted = greedy(model), usual_trace(model)
    handle = void_ext.patch(model, fuse=fuse) if when == "after" else None
    at_once = {"preload_module_classes": ["LlamaDecoderLayer"]} if fuse == "norm" else {}
    model = spread(model, tmp_path, **at_once) if family == "llama" else accelerate.cpu_offload(model, "cpu")
    handle = void_ext.patch(model, fuse=fuse) if handle is None else handle
    assert torch.equal(greedy(model), expected)
    assert handle.trace is not None
    same_trace(handle.trace, wanted, exact=fuse == "add")
    handle.unpatch()
    assert torch.equal(greedy(model), expected)
    hooks.remove_hook_from_submodules(model)
    assert not any(type(value).__module__.startswith("void_ext") for m in model.modules() for value in vars(m).values())


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_removed_while_patched(when: str, tiny: Any, greedy: Any) -> None:
    model = tiny("llama")
    expected = greedy(model)
    layer = model.model.layers[2]
    calls: list[int] = []

    class Counting(hooks.ModelHook):  # type: ignore[misc,name-defined]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    if when == "before":
        hooks.add_hook_to_module(layer, Counting())
    handle = void_ext.patch(model)
    if when == "after":
        hooks.add_hook_to_module(layer, Counting())
    assert torch.equal(greedy(model), expected)
    assert len(calls) == 6
    hooks.remove_hook_from_module(layer)
    assert torch.equal(greedy(model), expected)
    assert len(calls) == 6
    assert handle.trace is not None
    assert "fused (fuse='add')" in handle.describe()
    handle.unpatch()
    assert not any(type(value).__module__.startswith("void_ext") for m in model.modules() for value in vars(m).values())
    assert torch.equal(greedy(model), expected)


class Elsewhere(torch.Tensor):
    """A tensor that says it is elsewhere. A second device is not to be had here; what is computed is real."""

    device = property(lambda self: torch.device("cpu", 1))  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]


class Moving(hooks.ModelHook):  # type: ignore[misc,name-defined]
    """As AlignDevicesHook: the arguments of a module's forward are brought to its device, and what it gives stays."""

    def __init__(self, kind: type[torch.Tensor]):
        self.kind = kind

    def pre_forward(self, module: Any, stream: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (stream.as_subclass(self.kind), *args), kwargs


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("family", "first", "options"),
    [
        ("llama", 3, {}),
        ("llama", 3, {"updates": True, "halves": True}),
        ("llama", 3, {"mode": "skip", "plan": VoidPlan.from_layers(6, skip=[2, 4])}),
        ("gpt2", 3, {"updates": True}),
        ("gpt2", 5, {}),
    ],
    ids=["kept", "all tables", "skip", "hooks", "hooks, the last layer alone"],
)
@torch.no_grad()
def test_a_stream_that_changes_devices(
    family: str,
    first: int,
    options: dict[str, Any],
    when: str,
    tiny: Any,
    padded_batch: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One table per device, put together at the end of a call."""

    def on_one_device(op: Any, table: int) -> Any:
        def run(*args: Any) -> Any:
            assert args[0].device == args[table].device  # the op refuses it, but both are really on the CPU here
            return op(*args)

        return run

    monkeypatch.setattr(call, "_row_l2norm", on_one_device(call._row_l2norm, 1))
    monkeypatch.setattr(fused, "_add_l2norm", on_one_device(fused._add_l2norm, 2))
    model = tiny(family)
    ids, mask = padded_batch
    layers, norm = (
        (model.model.layers, model.model.norm) if family == "llama" else (model.transformer.h, model.transformer.ln_f)
    )
    with void_ext.patch(model, **options) as handle:
        expected = model(input_ids=ids, attention_mask=mask).logits
    wanted = handle.trace.prompt

    def spread() -> None:
        for layer in layers[first:]:
            hooks.add_hook_to_module(layer, Moving(Elsewhere))
        hooks.add_hook_to_module(norm, Moving(torch.Tensor))

    if when == "before":
        spread()
    with void_ext.patch(model, **options) as handle:
        if when == "after":
            spread()
        model(input_ids=ids.flip(0))  # its norms are in the tables when the next call begins
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
        assert set(handle._recorder._tables) == {torch.device("cpu"), torch.device("cpu", 1)}
    for name in ("norms", "updates", "halves"):
        if getattr(wanted, name) is not None:
            torch.testing.assert_close(getattr(handle.trace.prompt, name), getattr(wanted, name), rtol=2e-6, atol=1e-6)
    refused = [({"mode": "exit"}, "mode='exit'")]
    if family == "llama":
        refused.append(({"mode": "skip", "policy": void_ext.HaltPlan()}, "HaltPlan"))
    for settings, name in refused:
        with void_ext.patch(model, **settings), pytest.raises(RuntimeError, match=f"{name}.* needs all layers on one"):
            model(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def test_a_forward_of_the_users_own_survives_hooks_added_while_patched(tiny: Any) -> None:
    model, ids, calls = tiny("llama"), torch.arange(8)[None], []
    forward = model.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = own
    handle = void_ext.patch(model)
    hooks.add_hook_to_module(model, hooks.ModelHook())
    handle.unpatch()
    model(ids)
    assert calls == [1]
    hooks.remove_hook_from_module(model)
    assert model.__dict__["forward"] is own
