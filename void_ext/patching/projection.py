"""K and V of a layer that does not run: made for the cache by the attention's own modules, and nothing else of it.

Which modules, and in which order, is known for the attention forwards listed here by their digest
(:mod:`void_ext.patching.registry`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from void_ext.patching.ledger import cache_in
from void_ext.patching.registry import digest, own_forward


@dataclass(frozen=True)
class KeyForm:
    """What an attention does to its input until the cache's update.

    Attributes:
        norm: the norm of the keys, where the attention has it; a forward that asks a flag for it has none without.
        norm_at: ``"flat"``: over all heads, as they are projected; ``"head"``: of each head ``[B, T, heads, d]``;
            ``"transposed"``: the same as ``[B, heads, T, d]``; ``"rotated"``: after the rotary embedding.
        rotary: ``"always"``, or in which layers (:func:`_rotates`).
        packed: one projection ``qkv_proj`` makes queries, keys and values.
        clips: keys and values are clamped to ``config.clip_qkv`` where that is set.
        value_dim, value_scale: attributes with the width of a head's values and a factor for them.
    """

    norm: str = "k_norm"
    norm_at: str = "head"
    rotary: str = "always"
    packed: bool = False
    clips: bool = False
    value_dim: str = "head_dim"
    value_scale: str | None = None

    def parts(self, attention: nn.Module) -> tuple[nn.Module, ...]:
        """The modules whose parameters are read."""
        names = ("qkv_proj",) if self.packed else ("k_proj", "v_proj")
        norm = attention._modules.get(self.norm)
        return (*(getattr(attention, name) for name in names), *(() if norm is None else (norm,)))


_PLAIN = KeyForm()
_FLAT = KeyForm(norm_at="flat")
_TRANSPOSED = KeyForm(norm_at="transposed")

#: digest of an attention's forward -> how it makes K and V
ATTENTION_FORWARDS: dict[str, KeyForm] = {
    # transformers 4.57: llama, mistral, qwen2
    **dict.fromkeys(("835f43318dc1eb22", "5acb9d544704d799", "80ad52bb6aa1fc62"), _PLAIN),
    "2ea5083176be9412": _PLAIN,  # qwen3 in 4.57
    "f7f9bc7b127e10f1": _FLAT,  # olmo2 in 4.57
    "5ba965be63c6622e": KeyForm(packed=True),  # phi3 in 4.57
    # 5.17 to 5.24: the same three
    **dict.fromkeys(("6f87980ac0ee7e42", "f3d3c6d20f5eb730", "1a25cc1c6a4b9039"), _PLAIN),
    # 5.18
    "5992781fd240c8a2": _PLAIN,  # qwen3, qwen3_moe and others with a k_norm
    "0eb91c97ddcec95e": _PLAIN,  # laguna
    "7999fe821fcbbef0": _PLAIN,  # glm4_moe
    "e2c02bad13bc4f71": _PLAIN,  # seed_oss
    "aeb13b50bc15fc99": _PLAIN,  # starcoder2
    "6343c8cf66c96662": _PLAIN,  # ministral3
    "3e0775ae03209ecf": _PLAIN,  # ministral3 in 5.24
    "efa24e8ee5ce1211": _PLAIN,  # bitnet
    "8d4b6e0d654f3bc0": _PLAIN,  # diffllama
    "f875f63ad6e3fddc": _PLAIN,  # gpt_oss
    "4251587d03e6b032": _PLAIN,  # gemma2, vaultgemma
    "139c8cfff0326356": _TRANSPOSED,  # gemma3
    "a152c10770f7b44b": _TRANSPOSED,  # hy_v3, apertus
    "aeb6b07f30c48d51": KeyForm(norm_at="transposed", rotary="sliding, where any is"),  # exaone4, exaone_moe
    "45a6aaecf7ed9a46": _FLAT,  # olmo2, flex_olmo, minimax_m2
    "ce31ebbb29500f9f": _FLAT,  # olmo3
    "99bcff1697047f12": KeyForm(norm_at="flat", clips=True),  # olmoe
    "de596afd1c59bbea": KeyForm(clips=True),  # olmo
    "eaeef37163edc3b5": KeyForm(norm_at="rotated"),  # nanochat
    "dcd41dec16c4823f": KeyForm(norm="key_layernorm", norm_at="rotated"),  # hunyuan_v1_dense, hunyuan_v1_moe
    "7acf9370cd52434e": KeyForm(rotary="use_rope"),  # smollm3
    "3460ad0069f18c4f": KeyForm(rotary="is_local_attention"),  # afmoe
    "2da7fcf4922c4d4f": KeyForm(rotary="given"),  # granite_swa
    "ed35e92e93c370c0": KeyForm(value_dim="v_head_dim", value_scale="v_scale"),  # mimo_v2_flash
    "ce75cc4802ca6e38": KeyForm(packed=True),  # phi3
}


def key_form(attention: nn.Module) -> tuple[KeyForm | None, str]:
    """How the K and V of an attention can be made without the rest of it, or None, and the reason in words."""
    name = type(attention).__name__
    forward = own_forward(attention)
    if forward is None:
        return None, f"{name}.forward was replaced on the instance"
    try:
        found = digest(forward)
    except (OSError, TypeError, SyntaxError) as error:
        return None, f"the source of {name}.forward is not available ({error})"
    form = ATTENTION_FORWARDS.get(found)
    if form is None or _rotary_of(type(attention)) is None:
        return None, f"{name}.forward ({found}) is not one of the attention forwards known"
    return form, f"{name}.forward ({found}) is known"


def project(form: KeyForm, attention: Any, normed: Tensor, kwargs: dict[str, Any]) -> None:
    """The K and V of a layer that does not run, into the cache that its arguments name."""
    cache = cache_in(kwargs)
    if cache is None:
        return
    keys, values = _packed(attention, normed) if form.packed else (attention.k_proj(normed), attention.v_proj(normed))
    norm = attention._modules.get(form.norm)
    if norm is not None and form.norm_at == "flat":
        keys = norm(keys)
    if form.clips and (limit := attention.config.clip_qkv) is not None:
        keys, values = keys.clamp(min=-limit, max=limit), values.clamp(min=-limit, max=limit)
    keys = keys.view(*normed.shape[:-1], -1, attention.head_dim)
    if norm is not None and form.norm_at == "head":
        keys = norm(keys)
    keys = keys.transpose(1, 2)
    if norm is not None and form.norm_at == "transposed":
        keys = norm(keys)
    values = values.view(*normed.shape[:-1], -1, getattr(attention, form.value_dim)).transpose(1, 2)
    if form.value_scale is not None:
        values = values * getattr(attention, form.value_scale)
    embeddings = kwargs.get("position_embeddings")
    # Positions come from the caller in transformers 4.57, from the cache in 5.x.
    extra: dict[str, Any] = {"cache_position": kwargs["cache_position"]} if "cache_position" in kwargs else {}
    if _rotates(form.rotary, attention, embeddings):
        assert embeddings is not None
        cos, sin = embeddings
        rotate = _rotary_of(type(attention))
        assert rotate is not None
        # No queries are needed. A kernel that stands in for the function (Liger's) may not take none, and may write to
        # what it is given.
        known = str(getattr(rotate, "__module__", "")).startswith("transformers.")
        _, keys = rotate(keys[:, :0] if known else keys.clone(), keys, cos, sin)
        if extra:
            extra.update(sin=sin, cos=cos)
    if norm is not None and form.norm_at == "rotated":
        keys = norm(keys)
    cache.update(keys, values, attention.layer_idx, *((extra,) if extra else ()))


def _rotates(rule: str, attention: Any, embeddings: Any) -> bool:
    if rule == "always":
        return True
    if rule == "given":
        return embeddings is not None
    if rule == "sliding, where any is":
        return attention.sliding_window is None or bool(attention.is_sliding)
    return bool(getattr(attention, rule))


def _packed(attention: Any, normed: Tensor) -> tuple[Tensor, Tensor]:
    """The last two of queries, keys and values; the queries' rows of a plain linear's weight are not read."""
    projection, config = attention.qkv_proj, attention.config
    queries = config.num_attention_heads * attention.head_dim
    width = config.num_key_value_heads * attention.head_dim
    plain = type(projection) is nn.Linear and "forward" not in projection.__dict__
    if plain and not projection._forward_hooks and not projection._forward_pre_hooks:
        bias = None if projection.bias is None else projection.bias[queries:]
        made = torch.nn.functional.linear(normed, projection.weight[queries:], bias)
    else:
        made = projection(normed)[..., queries:]
    return made[..., :width], made[..., width:]


def _rotary_of(attention: Any) -> Any:
    """The rotary embedding that the forward of an attention class calls, also where a subclass inherits it."""
    return inspect.unwrap(attention.forward).__globals__.get("apply_rotary_pos_emb")
