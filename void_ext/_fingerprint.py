"""What a plan remembers of the model it was made for: its architecture, a hash of its norms, the size of its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_KEY_VALUE = ("k_proj", "v_proj", "key", "value", "k_norm", "k_layernorm")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
#: Numbers that must agree between a plan's model and the one it is used with.
SIZES = ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim", "vocab_size")


@dataclass(frozen=True)
class Weights:
    """Numbers of weights, biases included; the first three per layer.

    Attributes:
        attention: the attention half with its norms.
        project: what PROJECT computes of it: its first norm and the key and value projections. Where they are one
            matrix with the queries', their share of it; where none is found, the whole half.
        mlp: the rest of the layer.
        other: the output head. Embeddings are looked up, not multiplied with, and do not count.
    """

    attention: tuple[int, ...]
    project: tuple[int, ...]
    mlp: tuple[int, ...]
    other: int


@dataclass(frozen=True)
class Fingerprint:
    """The model a plan was made for, as far as its sizes and its norm weights tell. Matrices are not looked at: models
    with the same norm weights (a fine-tune that left them as they were, or new ones, where all are 1) are alike here.

    Attributes:
        model_type: of the (text) configuration.
        layers, hidden_size, intermediate_size, heads, kv_heads, head_dim, vocab_size: its sizes.
        norms: sha256, in hex, over the little-endian float32 bytes of all norm weights in the order of
            ``named_modules()``: the part of a checkpoint that quantisation leaves alone. Empty where they could not be
            read (weights on the meta device).
        quantised: the model carries a quantisation configuration.
        weights: how large the parts of the model are.
    """

    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norms: str
    quantised: bool
    weights: Weights

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a transformers model, patched or not.

        Raises TypeError for anything else, ValueError where its decoder layers are not to be found. Cost: copies the
        norm weights to the host, some (2L + 1) D numbers.
        """
        config = text_config(model)
        hidden = _size(config, "hidden_size")
        heads = _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", "num_kv_heads", default=heads)
        layers = _layer_stack(model, _layer_count(config))
        share = 2 * kv_heads / (heads + 2 * kv_heads) if heads else 1.0
        attention, project, mlp = zip(*(_halves(layer, share) for layer in layers), strict=True)
        head = _output_head(model)
        return cls(
            model_type=str(getattr(config, "model_type", "")),
            layers=len(layers),
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=_size(config, "head_dim", default=hidden // heads if heads else 0),
            vocab_size=_size(config, "vocab_size"),
            norms=norm_hash(model),
            quantised=_quantised(model),
            weights=Weights(attention, project, mlp, 0 if head is None else _count(head)),
        )

    def differences(self, other: Fingerprint) -> list[str]:
        """In words, what of the architecture is another: ``"layers 30 instead of 28"``."""
        names = ("model_type", *SIZES)
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} {theirs} instead of {ours}" for name, ours, theirs in pairs if ours != theirs]


def text_config(model: Any) -> Any:
    """The configuration of a model's decoder; TypeError for what is no transformers model."""
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    return config.get_text_config(decoder=True)


def layer_count(model: nn.Module) -> int:
    """How many decoder layers a model's configuration states."""
    return _layer_count(text_config(model))


def norm_hash(model: nn.Module) -> str:
    """sha256 over all norm weights as float32; "" where some cannot be read."""
    result = hashlib.sha256()
    for module in model.modules():
        weight = getattr(module, "weight", None) if "norm" in type(module).__name__.lower() else None
        if not isinstance(weight, torch.Tensor):
            continue
        if weight.device.type == "meta":
            return ""
        result.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes())
    return result.hexdigest()


def _layer_count(config: Any) -> int:
    # In configurations of encoder-decoders num_hidden_layers counts the encoder's.
    count = _size(config, "decoder_layers", "num_hidden_layers")
    if count < 1:
        raise ValueError("model: expected a configuration with num_hidden_layers, found none")
    return count


def _size(config: Any, *names: str, default: int = 0) -> int:
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers 5.24, where layers have values of their own: the common one
            value = vars(config).get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def _output_head(model: Any) -> nn.Module | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None


def _quantised(model: Any) -> bool:
    configs = (model.config, text_config(model))
    return any(getattr(config, "quantization_config", None) is not None for config in configs) or bool(
        getattr(model, "is_quantized", False)
    )


def _layer_stack(model: nn.Module, count: int) -> list[nn.Module]:
    stacks = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and all(map(_has_matrices, module))
    ]
    # The layers hold their projections as children; a list of plain linears of the same length is something else.
    stacks = [stack for stack in stacks if all(any(True for _ in layer.children()) for layer in stack)]
    if len(stacks) != 1:
        raise ValueError(f"model: expected one list of {count} decoder layers, found {len(stacks)}")
    return stacks[0]


def _has_matrices(module: nn.Module) -> bool:
    return any(_is_linear(part) or _owns_matrix(part) for part in module.modules())


def _owns_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def _count(module: nn.Module) -> int:
    """Weights of a module. A linear counts by its features: quantised ones pack several weights into one number, and
    adapters wrap theirs."""
    if _is_linear(module):
        bias = getattr(module, "bias", None)
        return int(module.in_features) * int(module.out_features) + _numel(bias)  # type: ignore[arg-type]
    own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return own + sum(_count(child) for child in module.children())


def _numel(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _halves(layer: nn.Module, fused_share: float) -> tuple[int, int, int]:
    """Weights of a layer's attention half, of what PROJECT needs of it, and of the rest."""
    children = list(layer.named_children())
    norms = [child for _, child in children if not _has_matrices(child) and _count(child)]
    # In order of registration: input norm | post-attention norm, and Gemma's four two by two.
    ours = norms[: (len(norms) + 1) // 2]
    attention = [child for name, child in children if _is_attention(name, child)]
    whole = sum(map(_count, [*attention, *ours]))
    first = _count(ours[0]) if ours else 0
    project = min(first + sum(_key_value(child, fused_share) for child in attention), whole)
    return whole, project, _count(layer) - whole


def _is_attention(name: str, module: nn.Module) -> bool:
    return _has_matrices(module) and any(word in name.lower() for word in ("attn", "attention"))


def _key_value(attention: nn.Module, fused_share: float) -> int:
    parts = list(_named_parts(attention, _KEY_VALUE))
    if any(_has_matrices(part) for part in parts):
        return sum(map(_count, parts))
    fused = sum(map(_count, _named_parts(attention, _FUSED)))
    return round(fused * fused_share) if fused else _count(attention)


def _named_parts(module: nn.Module, names: Iterable[str]) -> Iterator[nn.Module]:
    wanted = set(names)
    for path, part in module.named_modules():
        if path.rpartition(".")[2] in wanted:
            yield part
