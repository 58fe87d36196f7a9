"""What the model benchmarks share: models on the same weights, plain hooks, and one unit of work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import void_ext

VARIANTS = ("fuse=add", "fuse=norm", "plain hooks")
PROMPT = 32


def twin(model: nn.Module) -> nn.Module:
    """A second model object on the same weights and buffers, so that memory and caches are shared."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def variant(model: nn.Module, name: str) -> nn.Module:
    """A twin that is traced the way ``name`` says."""
    other = twin(model)
    if name == "plain hooks":
        hook_plainly(other)
    elif name in VARIANTS:
        void_ext.patch(other, fuse=name.removeprefix("fuse="))
    else:
        raise ValueError(f"name: expected one of {VARIANTS}, got {name!r}")
    return other


def hook_plainly(model: nn.Module) -> None:
    """What one writes without this library: a hook on each layer that appends the norm of its output to a list."""
    body = model.model
    kept: list[Tensor] = []

    def enter(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        kept.clear()  # one forward call's worth, so that memory does not grow with the number of runs
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        kept.append(hidden.norm(dim=-1))

    def leave(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).norm(dim=-1))

    body.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    for layer in body.layers:
        layer.register_forward_hook(leave)


def prefill(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    """One forward over the whole prompt, filling a cache, with the logits of the last position."""

    @torch.inference_mode()
    def work() -> object:
        return model(ids, use_cache=True, logits_to_keep=1)

    return work


def decode(model: nn.Module, ids: Tensor, steps: int) -> Callable[[], object]:
    """``steps`` single-token forwards after a prompt; each run starts from the same cache, cut back to the prompt."""
    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    length = ids.shape[1]
    token = ids[:, -1:]

    @torch.inference_mode()
    def work() -> object:
        if cache.get_seq_length() > length:
            cache.crop(length - cache.get_seq_length())
        output = None
        for _ in range(steps):
            output = model(token, past_key_values=cache, use_cache=True)
        return output

    return work


def graphed_decode(model: nn.Module, ids: Tensor, steps: int) -> Callable[[], object]:
    """:func:`decode` with a static cache, where one step is captured in a CUDA graph and replayed."""
    from transformers import StaticCache

    length = ids.shape[1]
    token = ids[:, -1:].clone()
    cache = StaticCache(config=model.config, max_cache_len=length + steps + 8)
    side = torch.cuda.Stream()
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        lengths = [layer.cumulative_length for layer in cache.layers]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):  # modules load and tables grow before the capture
            for _ in range(3):
                model(token, past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(token, past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def work() -> object:
        torch._foreach_zero_(lengths)
        torch._foreach_add_(lengths, length)
        for _ in range(steps):
            graph.replay()
        return output

    return work


def compiled_decode(model: nn.Module, ids: Tensor, steps: int) -> Callable[[], object]:
    """:func:`decode` with a static cache, compiled as ``generate()`` compiles it there."""
    from transformers import StaticCache

    length = ids.shape[1]
    token = ids[:, -1:].clone()
    cache = StaticCache(config=model.config, max_cache_len=length + steps + 8)
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    lengths = [layer.cumulative_length for layer in cache.layers]
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    @torch.inference_mode()
    def work() -> object:
        torch._foreach_zero_(lengths)
        torch._foreach_add_(lengths, length)
        output = None
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            output = forward(token, past_key_values=cache, use_cache=True)
        return output

    for _ in range(3):  # compiles, and where there are CUDA graphs warms up and captures
        work()
    return work


def launches(work: Callable[[], object]) -> int | None:
    """What one run of ``work`` enqueues on the GPU, kernels, copies and fills; None where torch cannot count them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as counted:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in counted.events()) or None


def lacking(model: nn.Module, layers: list[int]) -> nn.Module:
    """A twin that physically lacks ``layers``."""
    other = twin(model)
    body = other.model
    body.layers = nn.ModuleList(layer for index, layer in enumerate(body.layers) if index not in layers)
    for index, layer in enumerate(body.layers):
        layer.self_attn.layer_idx = index
    config = copy.deepcopy(other.config)
    config.num_hidden_layers = len(body.layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(body.layers)]
    other.config = body.config = config
    return other


def projections(model: nn.Module, layers: list[int], work: str, ids: Tensor, steps: int) -> Callable[[], object]:
    """The K and V that ``layers`` would put into a cache in one unit of ``work``, and nothing else."""
    from transformers import DynamicCache

    from void_ext.patching.projection import key_form, project

    body = model.model
    chosen = [(body.layers[layer].input_layernorm, body.layers[layer].self_attn) for layer in layers]
    form, why = key_form(chosen[0][1])
    assert form is not None, why
    with torch.inference_mode():
        hidden = body.embed_tokens(ids)
        positions = torch.arange(ids.shape[1] + steps, device=ids.device)[None]
        rotary = body.rotary_emb(hidden, position_ids=positions)

    def run(cache: Any, states: Tensor, first: int) -> None:
        span = slice(first, first + states.shape[1])
        embeddings = tuple(part[:, span] for part in rotary)
        for norm, attention in chosen:
            project(form, attention, norm(states), {"past_key_values": cache, "position_embeddings": embeddings})

    if work == "prefill":

        @torch.inference_mode()
        def prefill() -> object:
            cache = DynamicCache(config=model.config)
            run(cache, hidden, 0)
            return cache

        return prefill
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        run(cache, hidden, 0)

    @torch.inference_mode()
    def decode() -> object:
        for layer in layers:
            slot = cache.layers[layer]
            if slot.get_seq_length() > ids.shape[1]:
                slot.crop(ids.shape[1] - slot.get_seq_length())
        for step in range(steps):
            run(cache, hidden[:, -1:], ids.shape[1] + step)
        return cache

    return decode
