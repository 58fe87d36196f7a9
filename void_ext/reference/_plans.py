"""Plans in plain torch: every half of every layer is computed for every token, and what was not wanted thrown away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PlanResult:
    """What a plan makes of a sequence.

    Attributes:
        logits: ``[B, T, vocabulary]``.
        streams: L + 1 tensors ``[B, T, D]``, the residual stream before layer 0 and after each layer.
        keys, values: per layer ``[B, heads, T, head width]``, as a KV cache holds them of a layer run or projected.
    """

    logits: Tensor
    streams: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


def run_plan(
    model: Any,
    ids: Tensor,
    attention: Tensor,
    mlp: Tensor,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> PlanResult:
    """``h = h + attention(norm(h))`` where ``attention``, then ``h = h + mlp(norm(h))`` where ``mlp``, without a cache.

    A token's K and V come from the stream that really enters the layer, whether the token runs it or not. That is what
    a cache without holes holds; tokens that ran a layer whose past was never made would differ, and must not exist.

    Args:
        model: a Llama-like ``…ForCausalLM``: ``model.model`` has ``embed_tokens, rotary_emb, layers, norm``.
        ids: ``[B, T]``.
        attention, mlp: ``[B, T, L]`` bool, which halves run for which token.
        mask: ``[B, T]``, 0 = padding; None: all real.
        positions: ``[B, T]`` position ids; None: counted from 0, padding included.
    """
    body = model.model
    batch, length = ids.shape
    if positions is None:
        positions = torch.arange(length, device=ids.device).expand(batch, -1)
    stream = body.embed_tokens(ids)
    rotary = body.rotary_emb(stream, position_ids=positions)
    seen = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        seen &= ~torch.ones_like(seen).tril(-window)
    allowed = seen.expand(batch, 1, -1, -1)
    if mask is not None:
        # A padding token attends to itself, so that its row is a number.
        own = torch.eye(length, dtype=torch.bool, device=ids.device)
        allowed = (allowed & (mask[:, None, None, :] != 0)) | own
    bias = torch.zeros(allowed.shape, dtype=stream.dtype, device=ids.device).masked_fill(
        ~allowed, torch.finfo(stream.dtype).min
    )
    streams, keys, values = [stream], [], []
    for index, layer in enumerate(body.layers):
        module = layer.self_attn
        normed = layer.input_layernorm(stream)
        shape = (batch, length, -1, module.head_dim)
        keys.append(_rotate(module.k_proj(normed).view(shape).transpose(1, 2), *rotary))
        values.append(module.v_proj(normed).view(shape).transpose(1, 2))
        update = module(hidden_states=normed, attention_mask=bias, position_embeddings=rotary, past_key_values=None)[0]
        stream = torch.where(attention[..., index, None], stream + update, stream)
        update = layer.mlp(layer.post_attention_layernorm(stream))
        stream = torch.where(mlp[..., index, None], stream + update, stream)
        streams.append(stream)
    return PlanResult(model.lm_head(body.norm(stream)), streams, keys, values)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]
