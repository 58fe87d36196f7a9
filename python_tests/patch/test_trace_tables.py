"""What the tables of a trace hold, and which layers are active by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext
from python_tests.patch.norms import close

pytestmark = pytest.mark.usefixtures("ways_of_taking_norms")


def first(output: Any) -> torch.Tensor:
    """The stream in a layer's output, which is a tuple for some families of transformers 4.57."""
    return output[0] if isinstance(output, tuple) else output


def like(output: Any, stream: torch.Tensor) -> Any:
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


@torch.no_grad()
def test_optional_tables(tiny: Any, padded_batch: Any) -> None:
    ids, mask = padded_batch
    for family in ("llama", "gpt2"):
        model = tiny(family)
        with void_ext.patch(model, updates=True, halves=family == "llama") as handle:
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        assert handle.trace is not None
        prompt = handle.trace.prompt
        assert prompt.updates is not None
        for layer in range(5):  # the last hidden state is already normed
            change = (states[layer + 1].double() - states[layer].double()).norm(dim=-1)
            torch.testing.assert_close(prompt.updates[..., layer], change.float(), rtol=1e-5, atol=0)
        if family == "llama":
            middle: list[torch.Tensor] = []
            norm = model.model.layers[3].post_attention_layernorm
            hook = norm.register_forward_pre_hook(lambda m, args: middle.append(args[0]))  # noqa: B023
            model(input_ids=ids, attention_mask=mask)
            hook.remove()
            assert prompt.halves is not None
            close(prompt.halves[..., 3], middle[0].double().norm(dim=-1))
        else:
            assert prompt.halves is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_are_of_the_stream_as_hooks_left_it(
    family: str, late: bool, in_place: bool, mode: Any, tiny: Any, padded_batch: Any
) -> None:
    model = tiny(family)
    ids, _ = padded_batch
    layers = model.model.layers if family == "llama" else model.transformer.h

    def steer_all() -> None:
        for index in (1, 5):
            layers[index].register_forward_hook(
                lambda m, a, o: like(o, first(o).mul_(3.0) if in_place else first(o) * 3.0)
            )

    if not late:
        steer_all()
    with void_ext.patch(model) as handle, mode():
        if late:
            steer_all()
        seen: list[torch.Tensor] = []
        layers[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
        model(input_ids=ids)
    assert handle.trace is not None
    norms = handle.trace.prompt.norms
    close(norms[..., 2], seen[0].double().norm(dim=-1))
    real = ids != 0  # the pad token's embedding is zero, and stays zero
    assert float((norms[..., 6] / norms[..., 5])[real].min()) > 1.5


@torch.no_grad()
def test_granularity_pools_one_forward_call(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    for granularity in ("sequence", "batch"):
        with void_ext.patch(model, granularity=granularity, alpha=0.3) as handle:
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert handle.trace is not None
        prompt, response = handle.trace.prompt, handle.trace.response
        squares = prompt.norms.double().square() * prompt.mask[..., None]
        pooled = squares.sum(1) if granularity == "sequence" else squares.sum((0, 1), keepdim=True)[0]
        expected = void_ext.void_mask(pooled.sqrt().float(), 0.3)
        assert torch.equal(prompt.active(), expected[:, None].expand(3, 9, 6))
        if granularity == "sequence":
            token = void_ext.void_mask(response.norms.flatten(0, 1), 0.3).view(3, 3, 6)
            assert torch.equal(response.active(), token)
        else:
            assert torch.equal(response.active()[0], response.active()[2])


@torch.no_grad()
def test_any_alpha_after_the_fact(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    with void_ext.patch(model, alpha=0.8) as handle:
        model(input_ids=ids, attention_mask=mask)
    trace = handle.trace
    assert trace is not None
    deltas = trace.prompt.deltas()
    for alpha in (0.0, 0.2, 0.8, 3.0):
        expected = torch.ones_like(deltas, dtype=torch.bool)
        expected[..., 0] = ~(deltas[..., 0] < 0)
        for layer in range(1, 6):
            before = deltas[..., :layer]
            expected[..., layer] = ~(deltas[..., layer] < alpha * (before.amax(-1) - before.amin(-1)))
        assert torch.equal(trace.prompt.active(alpha), expected)
        real = expected[mask.bool()].float().mean(0)
        torch.testing.assert_close(trace.prompt.usage(alpha), real)
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha: expected a finite number >= 0, got {alpha}"):
            trace.prompt.active(alpha)
    with pytest.raises(ValueError, match="per: expected None or 'row', got 'layer'"):
        trace.prompt.usage(per="layer")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_no_active_layer_exits_with_the_embedding(family: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny(family)
    ids = padded_batch[0].clamp_min(3)  # the pad token's embedding is zero: its deltas are, too, and equality is active
    body = model.model if family == "llama" else model.transformer
    layers, norm = (body.layers, body.norm) if family == "llama" else (body.h, body.ln_f)
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    entered: list[torch.Tensor] = []
    layers[0].register_forward_pre_hook(lambda m, args: entered.append(args[0].clone()))
    # Every layer takes a tenth off the stream: all deltas are negative, and below any range before them.
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda m, args, out, factor=0.9 - 0.1 * index: like(out, args[0] * factor))
    with void_ext.patch(model, mode="exit", alpha=0.0) as handle:
        logits = model(input_ids=ids).logits
    assert handle.trace is not None
    assert not bool(handle.trace.prompt.active().any())
    assert torch.equal(logits, model.lm_head(norm(entered[0])))


@torch.no_grad()
def test_a_stream_that_lies_otherwise_in_memory(tiny: Any, padded_batch: Any) -> None:
    """A hook leaves rows that are not neighbours from one layer on; the norms of those before are taken as ever."""
    ids, mask = padded_batch

    def turn(module: Any, args: Any, output: Any) -> Any:
        stream = first(output)
        turned = stream.transpose(0, 1).contiguous().transpose(0, 1)
        assert not turned.is_contiguous()
        return like(output, turned)

    for family in ("llama", "gpt2"):
        model = tiny(family)
        with void_ext.patch(model) as handle:
            model(input_ids=ids, attention_mask=mask)
            assert handle.trace is not None
            expected = handle.trace.prompt.norms
            layers = model.model.layers if family == "llama" else model.transformer.h
            layers[2].register_forward_hook(turn)
            model(input_ids=ids, attention_mask=mask)
            close(handle.trace.prompt.norms, expected, rtol=1e-5)
