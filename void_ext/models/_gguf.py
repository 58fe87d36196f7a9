"""One GGUF file of the Llama architecture -> a model directory as ``save_pretrained`` would leave it, in float32.

transformers reads config and tokenizer out of the file. It would read the weights as well, but marks the model as
quantised, refuses to save it, and wants accelerate; the package gguf dequantises the same numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from void_ext.models._common import ModelError, Progress

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: Path, directory: Path, progress: Progress) -> None:
    """Write config, generation config, tokenizer (with chat template) and weights of ``gguf`` into ``directory``."""
    progress("importing transformers", 0, 0)
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    progress("converting the tokenizer", 0, 0)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if config.model_type != "llama":
        raise ModelError(f"{gguf.name}: expected the architecture 'llama', got {config.model_type!r}")
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float32
    config.__dict__.pop("_model_name_or_path", None)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    config.save_pretrained(directory)
    _keep_readable_by_transformers_4(directory)
    weights = _weights(gguf, config.num_attention_heads, config.num_key_value_heads, progress)
    progress("writing the model", 0, 0)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _keep_readable_by_transformers_4(directory: Path) -> None:
    # Version 4 knows `rope_theta` only (not 5's `rope_parameters`) and would silently take its default; and it knows
    # the tokenizer class by its old name, which 5 accepts too.
    for name, entry, value in (
        ("config.json", "rope_theta", lambda old: old.get("rope_parameters", old)["rope_theta"]),
        ("tokenizer_config.json", "tokenizer_class", lambda old: "PreTrainedTokenizerFast"),
    ):
        entries = json.loads((directory / name).read_text())
        entries[entry] = value(entries)
        (directory / name).write_text(json.dumps(entries, indent=2) + "\n")


def _weights(gguf: Path, heads: int, kv_heads: int, progress: Progress) -> dict[str, torch.Tensor]:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = GGUFReader(gguf).tensors
    weights: dict[str, torch.Tensor] = {}
    for index, tensor in enumerate(tensors):
        progress("dequantising the weights", index, len(tensors))
        name = _name(tensor.name)
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.endswith("q_proj.weight"):
            values = _unpermute(values, heads)
        elif name.endswith("k_proj.weight"):
            values = _unpermute(values, kv_heads)
        weights[name] = torch.from_numpy(np.array(values, order="C"))
    return weights


def _name(gguf_name: str) -> str:
    stem, _, kind = gguf_name.rpartition(".")
    if kind == "weight" and stem in _TOP:
        return f"{_TOP[stem]}.weight"
    block, _, part = stem.rpartition(".")
    if kind == "weight" and part in _LAYER and block.startswith("blk."):
        return f"model.layers.{block.removeprefix('blk.')}.{_LAYER[part]}.weight"
    raise ModelError(f"GGUF: no place in a Llama model for the tensor {gguf_name!r}")


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    # GGUF interleaves the two halves of each head's rotary dimensions, transformers keeps them one after the other.
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
