"""Tracing on a GPU: the model's own bits, no wait for the device, and a decode step that a CUDA graph can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext
from void_ext.testing import assert_bits_equal, assert_close, tolerance

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@torch.no_grad()
def test_logits_are_the_models_own(family: str, dtype: torch.dtype, cuda: torch.device, tiny: Any) -> None:
    model = tiny(family, dtype=dtype).to(cuda)
    ids = torch.arange(3 * 17, device=cuda).view(3, 17) % 90
    expected = model(ids).logits
    step = model(ids[:, :1], past_key_values=model(ids).past_key_values).logits
    with void_ext.patch(model) as handle:
        assert_bits_equal(model(ids).logits, expected, "prefill")
        assert_bits_equal(model(ids[:, :1], past_key_values=model(ids).past_key_values).logits, step, "decode")
        norms = handle.trace.prompt.norms
    assert norms.device.type == "cuda"
    assert bool(norms.isfinite().all())


@pytest.mark.parametrize("most", [1 << 20, 0], ids=["few rows", "many rows"])
@torch.no_grad()
def test_inductor_leaves_norms_and_bits(
    most: int, cuda: torch.device, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, few rows' norms are one launch of ours at the end of the graph; many rows' ride on the adds."""
    from void_ext.patching import call

    monkeypatch.setitem(call._KEPT_ELEMENTS, "cuda graph", most)
    model = tiny("llama").to(cuda)
    ids = torch.arange(3 * 17, device=cuda).view(3, 17) % 90
    with void_ext.patch(model) as handle:
        expected = model(ids).logits
        eager = handle.trace.prompt.norms
        actual = torch.compile(model, fullgraph=True)(ids).logits
        norms = handle.trace.prompt.norms
    size = expected.abs().max()  # the tolerance is for logits of size 1
    limit = tolerance("logits", torch.float32, model.config.hidden_size)
    assert_close(actual / size, (expected / size).double(), limit, "logits")
    assert torch.allclose(norms, eager, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_norms_taken_at_the_end_are_those_of_the_adds(
    family: str, dtype: torch.dtype, cuda: torch.device, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from void_ext.patching import call

    model = tiny(family, dtype=dtype).to(cuda)
    ids = torch.arange(3 * 17, device=cuda).view(3, 17) % 90
    expected = torch.stack(
        [state.double().norm(dim=-1) for state in model(ids, output_hidden_states=True).hidden_states]
    )
    found = []
    for most in (1 << 20, 0):
        monkeypatch.setitem(call._KEPT_ELEMENTS, "cuda", most)
        with void_ext.patch(model) as handle:
            model(ids)
            found.append(handle.trace.prompt.norms)
    assert_bits_equal(*found, "norms")
    # The last of transformers' states is behind the final norm.
    near = expected[:-1].movedim(0, -1).cpu()
    assert torch.allclose(found[0][..., :-1].double().cpu(), near, rtol=1e-5)


@pytest.mark.parametrize("fuse", ["add", "norm"])
@torch.no_grad()
def test_a_traced_token_waits_for_nothing(fuse: str, cuda: torch.device, tiny: Any) -> None:
    from transformers import DynamicCache

    model = tiny("llama").to(cuda)
    ids = torch.arange(3 * 17, device=cuda).view(3, 17) % 90
    with void_ext.patch(model, fuse=fuse):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        for _ in range(3):  # libraries set themselves up
            model(ids[:, :1], past_key_values=cache)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                model(ids[:, :1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def skipping(by_row: bool) -> void_ext.VoidPlan:
    if not by_row:
        return void_ext.VoidPlan.from_layers(6, skip=[2, 3])
    run, project, skip = void_ext.Action.RUN, void_ext.Action.PROJECT, void_ext.Action.SKIP
    rows = [tuple(project if (layer + row) % 3 == 0 else run for layer in range(6)) for row in range(3)]
    mlps = [tuple(skip if action == project else run for action in row) for row in rows]
    return void_ext.VoidPlan(void_ext.PhasePlan.dense(6), void_ext.PhasePlan(tuple(rows), tuple(mlps)))


@pytest.mark.parametrize("way", ["fuse=add", "fuse=norm", "skip", "skip by row", "compiled"])
@torch.no_grad()
def test_what_a_graph_writes_to_outlives_the_trace(way: str, cuda: torch.device, tiny: Any) -> None:
    """Replays after other prompts, longer and in larger batches, after a reset and after unpatching read and write
    nobody's memory: what the patch would have given back is refilled here, and looked at again."""
    from transformers import StaticCache

    model = tiny("llama").to(cuda)
    ids = torch.arange(3 * 17, device=cuda).view(3, 17) % 90
    settings: dict[str, Any] = {"fuse": way.removeprefix("fuse=")} if way.startswith("fuse") else {}
    if way.startswith("skip"):
        settings = {"mode": "skip", "plan": skipping(by_row=way == "skip by row")}
    handle = void_ext.patch(model, **settings)
    step = torch.compile(model) if way == "compiled" else model
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids, past_key_values=cache)
    token = ids[:, :1].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(token, past_key_values=cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(token, past_key_values=cache).logits
    lengths = [layer.cumulative_length.clone() for layer in cache.layers]

    def replayed() -> torch.Tensor:
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)
        graph.replay()
        return output.clone()

    expected = replayed()

    def look() -> None:
        others = [torch.full((size,), 7.0, device=cuda) for size in (32, 96, 128, 256, 1024, 4096) for _ in range(64)]
        assert_bits_equal(replayed(), expected, "logits")
        assert all(bool((other == 7.0).all()) for other in others)

    for batch, length in ((3, 1), (3, 40), (3 if way == "skip by row" else 5, 70)):
        model(torch.ones(batch, length, dtype=torch.long, device=cuda))
        look()
    handle.reset()
    look()
    void_ext.unpatch(model)
    look()


@pytest.mark.parametrize("way", ["add", "add, many rows", "norm"])
@torch.no_grad()
def test_a_graph_holds_a_traced_step(way: str, cuda: torch.device, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays read the token of the moment; with fuse="add" they give the bits of the unpatched model's graph."""
    from transformers import StaticCache

    from void_ext.patching import call

    fuse = way.split(",")[0]
    if fuse != way:
        monkeypatch.setitem(call._KEPT_ELEMENTS, "cuda graph", 0)
    model = tiny("llama").to(cuda)
    ids = torch.arange(3 * 17, device=cuda).view(3, 17) % 90
    tokens = [torch.full((3, 1), token, device=cuda) for token in (5, 11, 80)]

    def logits() -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(ids, past_key_values=cache)
        token = tokens[0].clone()
        lengths = [layer.cumulative_length for layer in cache.layers]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(token, past_key_values=cache)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(token, past_key_values=cache).logits
        found = []
        for value in tokens:
            for length in lengths:
                length.fill_(ids.shape[1])
            token.copy_(value)
            graph.replay()
            found.append(output.clone())
        torch.cuda.synchronize()
        return torch.stack(found)

    expected = logits()
    with void_ext.patch(model, fuse=fuse):
        got = logits()
    assert not torch.equal(got[0], got[1])
    if fuse == "add":
        assert_bits_equal(got, expected, "logits")
    else:
        size = expected.abs().max()  # the tolerance is for logits of size 1
        limit = tolerance("logits", torch.float32, model.config.hidden_size)
        assert_close(got / size, (expected / size).double(), limit, "logits")
