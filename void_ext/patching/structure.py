"""Where the decoder layers and the final norm of a model are, found by structure and not by model name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

#: model type -> what its layers do instead of handing on one vector per input token, each in its turn
_OTHER_STREAMS = {
    **dict.fromkeys(
        ("deepseek_v4", "hy_v4", "qwen4_exp", "qwen4_exp_text"),
        "hand on several streams per token (hyper-connections)",
    ),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "hand on several streams per token (alternating updates)"),
    "prophetnet": "hand on a stream for each n-gram ahead beside the tokens'",
    "cpmant": "hand on the vectors of a learned prompt before the tokens'",
    **dict.fromkeys(
        ("musicgen_decoder", "musicgen_melody_decoder"), "hand on one vector for the tokens of several codebooks"
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "draft with the keys and values of another model"
    ),
    "reformer": "add to two streams in turn (reversible layers)",
    **dict.fromkeys(("dory", "inkling2_loop", "inkling2_loop_text"), "run several times in one forward (loops)"),
}


class UnsupportedModelError(ValueError):
    """The model has no residual stream that could be traced; the message says why."""


@dataclass(frozen=True)
class DecoderStack:
    """The part of a model that is patched.

    Attributes:
        model: the transformers model (inside of a PEFT wrapper, say); its ``generate`` is the one users call.
        body: the module whose forward takes the tokens and runs the layers one after the other.
        layers: the decoder layers that run, in order.
        final_norm: the norm after the last layer; None where the structure does not show it.
        name: the path of ``layers`` inside ``model``.
    """

    model: PreTrainedModel
    body: nn.Module
    layers: tuple[nn.Module, ...]
    final_norm: nn.Module | None
    name: str

    @property
    def model_type(self) -> str:
        return str(getattr(self.model.config, "model_type", ""))


def find_decoder_stack(model: nn.Module) -> DecoderStack:
    """Find what to patch.

    Raises:
        TypeError: not a transformers model (nor a wrapper around one).
        UnsupportedModelError: an encoder-decoder, an encoder, or no stack of layers to be found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    _refuse_replicas(model)
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise TypeError(
            f"model: expected a transformers PreTrainedModel (or a wrapper around one), got {type(model).__name__}"
        )
    label = f"{type(inner).__name__} (model_type {getattr(inner.config, 'model_type', '?')!r})"
    if getattr(inner.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model: {label} is an encoder-decoder; expected a decoder-only causal language model. Its decoder half "
            "can be traced where transformers loads it alone (for example BartForCausalLM)"
        )
    other = _OTHER_STREAMS.get(getattr(inner.config, "model_type", ""))
    if other is not None:
        raise UnsupportedModelError(
            f"model: the layers of {label} {other}; expected one residual stream, a vector per input token, and each "
            "layer once. No mode supports it"
        )
    name, layers = _find_layers(inner, label)
    path = name.rpartition(".")[0]
    body = inner.get_submodule(path)
    _refuse_compiled({label: inner, path: body, **{f"layer {index}": layer for index, layer in enumerate(layers)}})
    _refuse_bidirectional(inner, layers, label)
    _refuse_recurrent(inner, body, label)
    return DecoderStack(inner, body, layers, _find_final_norm(body, name.rpartition(".")[2]), name)


def refuse_sharded(model: nn.Module) -> None:
    """Mode ``"skip"`` cannot have weights that several processes hold parts of: each of them decides for itself."""
    module = sharded(model)
    if module is not None:
        raise UnsupportedModelError(
            f"mode: 'skip' does not support weights sharded by FSDP ({type(module).__name__}): what one process "
            "skips, others wait for; mode='trace' works, and 'skip' with a whole copy of the model per process"
        )


def sharded(model: nn.Module) -> nn.Module | None:
    """The first module whose weights FSDP spreads over processes."""

    def by_fsdp(module: nn.Module) -> bool:
        return any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__)

    return next(filter(by_fsdp, model.modules()), None)


def _refuse_replicas(model: nn.Module) -> None:
    devices = getattr(model, "device_ids", None) if isinstance(model, nn.DataParallel) else None
    if devices is not None and len(devices) > 1:
        raise UnsupportedModelError(
            f"model: nn.DataParallel copies it to {len(devices)} devices for every call, and copies do not record; use "
            "one device, a process per device (DistributedDataParallel), or from_pretrained(device_map='auto')"
        )


def _refuse_compiled(modules: dict[str, nn.Module]) -> None:
    """A model that was compiled as a whole is none of these: its compiled forward makes way for the patched one's."""
    for name, module in modules.items():
        if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            raise UnsupportedModelError(
                f"model: the forward of {name} was replaced by a compiled one, which would go on running what it "
                "compiled and trace nothing; del that attribute, patch, and compile again, or use "
                "torch.compile(model) or model.compile(), which can be patched before and after"
            )
    for name, module in list(modules.items())[1:]:
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise UnsupportedModelError(
                f"model: {name} went through torch.compile by itself; expected the whole model compiled, "
                "torch.compile(model) or model.compile(), or nothing of it"
            )


def _find_layers(model: PreTrainedModel, label: str) -> tuple[str, tuple[nn.Module, ...]]:
    config = model.config.get_text_config(decoder=True)
    # In configurations of encoder-decoders num_hidden_layers counts the encoder's.
    count = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedModelError(f"model: {label} states no num_hidden_layers; expected a stack of decoder layers")
    found = _stacks(model, count)
    fewer = getattr(config, "num_layers", None)
    if not found and isinstance(
        fewer, int
    ):  # longcat_flash counts two attentions a layer, each with a slot in the cache
        found = _stacks(model, fewer)
    if not found:
        raise UnsupportedModelError(
            f"model: no list of {count} decoder layers was found in {label}; expected a decoder-only causal language "
            "model whose layers stand in one ModuleList"
        )
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise UnsupportedModelError(
            f"model: {label} has several stacks of {count} layers ({names}); expected exactly one"
        )
    name, stack = found[0]
    return name, tuple(stack)


def _stacks(model: nn.Module, count: int) -> list[tuple[str, nn.ModuleList]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _is_stack(module)
    ]


def _is_stack(module: nn.ModuleList) -> bool:
    # A decoder layer has linears inside; a list of norms or of embeddings of the same length has not.
    # A quantised linear may keep its weight in buffers (GPTQ), or where no tensor shows (torch's own int8).
    def holds_weights(layer: nn.Module) -> bool:
        matrices = sum(tensor.dim() >= 2 for tensor in (*layer.parameters(), *layer.buffers()))
        linears = sum(isinstance(getattr(part, "in_features", None), int) for part in layer.modules())
        return max(matrices, linears) >= 2 and any(True for _ in layer.children())

    return all(holds_weights(layer) for layer in module)


def _find_final_norm(body: nn.Module, layers_name: str) -> nn.Module | None:
    """The one norm registered behind the layers, or named as the final one before them (OPT)."""
    names = [name for name, _ in body.named_children()]
    norms = [name for name, child in body.named_children() if "norm" in type(child).__name__.lower()]
    behind = [name for name in norms if names.index(name) > names.index(layers_name)]
    found = behind or [name for name in norms if "final" in name]
    return body.get_submodule(found[0]) if len(found) == 1 else None


def _refuse_bidirectional(model: PreTrainedModel, layers: tuple[nn.Module, ...], label: str) -> None:
    flags = [
        module.is_causal
        for layer in layers
        for module in layer.modules()
        if isinstance(getattr(module, "is_causal", None), bool)
    ]
    known = (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation")
    encoder = model.config.model_type in known and not getattr(model.config, "is_decoder", False)
    # Cross-attention inside a decoder layer is not causal; a layer with no causal attention at all is an encoder's.
    if not any(flags) and (flags or encoder or not model.can_generate()):
        raise UnsupportedModelError(
            f"model: {label} attends in both directions; expected a decoder-only causal language model, whose tokens "
            "have one residual stream each that later tokens do not change"
        )


#: kinds of layers in a configuration whose state does not grow with the tokens
_RECURRENT = {"linear_attention", "mamba", "recurrent", "conv"}


def _refuse_recurrent(model: PreTrainedModel, body: nn.Module, label: str) -> None:
    names = inspect.signature(type(body).forward).parameters
    state = next((name for name in ("cache_params", "state", "mems") if name in names), None)
    if state is None and "use_cache" in names and not {"past_key_values", "cache"} & names.keys():
        state = "a state of its own"
    if "cache" in names:  # transformers 5.24: one name for states and for keys and values
        kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
        recurrent = set(kinds) <= _RECURRENT if kinds else getattr(model, "_is_stateful", False)
        state = "a state of its own" if recurrent else state
    if state is not None:
        raise UnsupportedModelError(
            f"model: {label} carries {state} from call to call instead of a KV cache, so positions "
            "cannot be counted; expected an attention model"
        )
