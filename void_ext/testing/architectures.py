"""Every causal language model of the installed transformers, built small and traced: what comes of each.

``python -m void_ext.testing.architectures docs/compatibility.md`` writes the table between the page's markers;
``--only NAME`` prints what comes of one.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = 3
VOCABULARY = 96
PARAMETERS = 40_000_000  # more than that is not small

#: what a configuration calls its sizes, and how small they get
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embedding_size", "dim", "width", "hidden_dim", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_size", "ffn_hidden_dim", "dense_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "hidden_size_per_layer_input", "mamba_d_state", "router_hidden_size"), 8),
    **dict.fromkeys(("vocab_size_per_layer_input",), VOCABULARY),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id",), 1),
    **dict.fromkeys(("eos_token_id",), 2),
}

_DRAFT = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8},
    **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "use_double_wide_mlp": False},
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}

#: configurations whose sizes hang together in their own way
SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "num_local_experts": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "cpmant": {"dim_head": 8, "prompt_length": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma4_assistant": {"text_config": _DRAFT},
    "gemma4_unified_assistant": {"text_config": _DRAFT},
    "gemma3n_text": {
        **{"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
        **{"laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0, 0.0]},
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"num_experts_per_tok": 2, "num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"head_dim": 16, "n_groups": 1, "state_size": 8},
    "qwen4_exp_text": {
        **{"indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1},
        **{"indexer_head_dim": 8},
    },
    "reformer": {
        **{"is_decoder": True, "attn_layers": ["local", "local", "local"], "attention_head_size": 8},
        **{"axial_pos_embds": False, "local_attn_chunk_length": 4, "feed_forward_size": 64},
    },
    "xlm": {"emb_dim": 32, "n_langs": 1},
    "zamba": {
        **{"num_hidden_layers": 6, "layer_types": ["mamba", "hybrid"] * 3, "use_mamba_kernels": False},
        **{"num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zamba2": {
        **{"layers_block_type": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 4, "num_key_value_heads": 4},
        **{"attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Outcome:
    """What came of one architecture; ``kind``: fused, generic, refused, unbuildable, or a fault: differs, breaks."""

    name: str
    kind: str
    skip: bool
    reason: str


def architectures() -> dict[str, tuple[type, type]]:
    """Name of the model's class -> (its configuration's class, itself)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found: dict[str, tuple[type, type]] = {}
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING.keys():  # noqa: SIM118 (a lazy mapping, whose iterator differs)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        classes: Any = model_class if isinstance(model_class, (tuple, list)) else (model_class,)
        for one in classes:
            found.setdefault(one.__name__, (config_class, one))
    return dict(sorted(found.items()))


def small_settings(config_class: Any) -> dict[str, Any]:
    """The sizes among :data:`SMALL` that a configuration has, and those of the configurations inside it."""
    try:
        default = config_class()
    except Exception:  # not valid without settings of its own; releases raise different things
        default = config_class(**SETTINGS.get(config_class.model_type, {}))
    settings = {name: value for name, value in SMALL.items() if name in default.to_dict()}
    names = set(getattr(config_class, "attribute_map", {}))
    settings = {name: value for name, value in settings.items() if name not in names}
    for name in getattr(config_class, "sub_configs", {}) or {}:
        inner = getattr(default, name, None)
        if inner is not None and type(inner).__name__ != "PreTrainedConfig":
            settings[name] = small_settings(type(inner))
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:  # latent attention makes keys for every head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    types = getattr(default, "layer_types", None)
    name = getattr(config_class, "attribute_map", {}).get("layer_types", "layer_types")
    given = not isinstance(
        getattr(config_class, name, None), property
    )  # what follows from other settings cannot be set
    if isinstance(types, (list, tuple)) and types and given:
        rarest_first = list(dict.fromkeys(types))
        settings["layer_types"] = [rarest_first[index % len(rarest_first)] for index in range(LAYERS)]
    return {**settings, **SETTINGS.get(default.model_type, {})}


def build(config_class: Any, model_class: Any) -> nn.Module:
    inner = getattr(model_class, "config_class", None)
    if inner in (getattr(config_class, "sub_configs", None) or {}).values():  # the text part of a multimodal model
        config_class = inner
    config = config_class(**small_settings(config_class))
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size} parameters at its smallest")
    torch.manual_seed(0)
    model: nn.Module = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all():
                parameter.normal_(0.0, 0.1)
    return model


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """What patching could leave behind: each module's attributes, hooks and forward."""
    hooks = [name for name in nn.Module().__dict__ if name.endswith("hooks") or "hooks_" in name]
    return [
        (
            *(name, type(module), sorted(module.__dict__), module.__dict__.get("forward")),
            *(tuple(getattr(module, hook) or ()) for hook in hooks),
        )
        for name, module in model.named_modules()
    ]


@torch.no_grad()
def forwards(model: Any, ids: Tensor, padded: Tensor | None = None) -> list[Tensor]:
    """Logits of a prompt and of two tokens after it through the cache it gave; of a left-padded batch."""
    out = model(input_ids=ids[:, :5], use_cache=True)
    logits = [out.logits]
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = getattr(out, name, None)
    if cache is not None:
        for position in (5, 6):
            out = model(input_ids=ids[:, position : position + 1], use_cache=True, **{name: cache})
            cache = getattr(out, name, cache)
            logits.append(out.logits)
    if padded is not None:
        logits.append(model(input_ids=ids, attention_mask=padded).logits)
    return logits


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip((x.contiguous() for x in one), (x.contiguous() for x in other), strict=True)
    )


def examine(name: str, config_class: Any, model_class: Any) -> Outcome:
    """Build one architecture and see what a patch makes of it."""
    try:
        model = build(config_class, model_class)
    except Exception as error:
        return Outcome(name, "unbuildable", False, f"cannot be built small: {type(error).__name__}: {_short(error)}")
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    before = snapshot(model)
    kind, reason = _traced(model, ids, mask, before)
    if kind in ("fused", "generic"):
        model.to(torch.bfloat16)
        low, why = _traced(model, ids, mask, snapshot(model))
        if low not in (kind, "unbuildable"):
            return Outcome(name, low, False, f"bfloat16: {why}")
    return Outcome(name, kind, kind == "fused" and _skips(model), reason)


def _traced(model: Any, ids: Tensor, mask: Tensor, before: Any) -> tuple[str, str]:
    import void_ext

    try:
        handle = void_ext.patch(model)
    except void_ext.UnsupportedModelError as error:
        if snapshot(model) != before:
            return "breaks", "a refused model was changed"
        return "refused", refusal(str(error))
    except Exception as error:
        return "breaks", f"patch: {type(error).__name__}: {_short(error)}"
    text = handle.describe()
    handle.unpatch()
    if snapshot(model) != before:
        return "breaks", "unpatched, something is left behind"
    try:
        expected = forwards(model, ids)
        again = forwards(model, ids)
    except Exception as error:
        return "unbuildable", f"does not run small: {type(error).__name__}: {_short(error)}"
    if not same(expected, again):
        return "unbuildable", "does not give the same logits twice"
    padded: Tensor | None = mask
    try:
        expected = forwards(model, ids, padded)
    except Exception:
        padded = None
    after = snapshot(model)  # a model may keep something of its own calls
    handle = void_ext.patch(model)
    try:
        actual = forwards(model, ids, padded)
        trace = handle.trace
    except Exception as error:
        return "breaks", f"{type(error).__name__}: {_short(error)}"
    finally:
        handle.unpatch()
    if snapshot(model) != after:
        return "breaks", "unpatched, something is left behind"
    if not same(expected, actual):
        return "differs", "the logits are not the unpatched model's"
    wanted = ids.shape[1] if padded is not None else (7 if len(expected) > 1 else 5)
    if trace is None or trace.prompt.norms.shape[1] + trace.response.norms.shape[1] != wanted:
        return "breaks", f"the trace has not {wanted} rows"
    if not (torch.isfinite(trace.prompt.norms).all() and torch.isfinite(trace.response.norms).all()):
        return "breaks", "norms that are not finite"
    try:
        norm_fault = _norms_differ(model, ids)
    except (AttributeError, KeyError, TypeError):
        norm_fault = ""
    if norm_fault:
        return "breaks", norm_fault
    return ("fused" if "fused (fuse" in text else "generic"), ""


@torch.no_grad()
def _norms_differ(model: Any, ids: Tensor) -> str:
    """Against the norms of the hidden states that the model shows itself, but the last, which is normed."""
    import void_ext

    with void_ext.patch(model) as handle:
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    if states is None or handle.trace is None:
        return ""
    norms = handle.trace.prompt.norms
    if len(states) != norms.shape[-1]:
        return ""
    for index, hidden in enumerate(states[:-1]):
        wanted = hidden.double().norm(dim=-1).float()
        if hidden.shape[:2] == norms.shape[:2] and not torch.allclose(norms[..., index], wanted, rtol=1e-5, atol=1e-6):
            return f"norms at {index} are not those of the model's hidden states"
    return ""


def _skips(model: Any) -> bool:
    import void_ext

    try:
        plan = void_ext.VoidPlan.from_layers(model, skip=[1])
        void_ext.patch(model, mode="skip", plan=plan).unpatch()
    except void_ext.UnsupportedModelError:
        return False
    return True


#: a piece of a refusal's message -> what it comes down to
REFUSALS = (
    ("is an encoder-decoder", "encoder-decoder"),
    ("attends in both directions", "attends in both directions"),
    ("instead of a KV cache", "recurrent state instead of a KV cache"),
    ("states no num_hidden_layers", "no stack of layers"),
    ("decoder layers was found", "no stack of layers"),
    ("several stacks", "several stacks of layers"),
    ("expected one residual stream", "not one stream per token"),
)


def refusal(message: str) -> str:
    """The kind of a refusal; its whole message where it is of none."""
    return next((kind for piece, kind in REFUSALS if piece in message), message)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return text if len(text) <= 90 else text[:87] + "..."


def walk(only: list[str] | None = None, progress: bool = False) -> list[Outcome]:
    """All architectures, or those named."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, (config_class, model_class) in architectures().items():
                if only is None or name in only:
                    found.append(examine(name, config_class, model_class))
                    gc.collect()
                    if progress:
                        print(
                            f"{found[-1].name:45} {found[-1].kind:12} {found[-1].reason}", file=sys.stderr, flush=True
                        )
    finally:
        torch.set_num_threads(threads)
    return found


BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a table in Markdown, with their sums before it."""
    import transformers

    kinds = ("fused", "generic", "refused", "unbuildable", "differs", "breaks")
    sums = ", ".join(f"{sum(one.kind == kind for one in outcomes)} {kind}" for kind in kinds)
    lines = [
        f"transformers {transformers.__version__}: {len(outcomes)} architectures; {sums}.",
        "",
        "| architecture | adapter | skip | reason |",
        "|---|---|---|---|",
    ]
    lines += [f"| {o.name} | {o.kind} | {'yes' if o.skip else 'no'} | {o.reason} |" for o in outcomes]
    return "\n".join(lines)


def read_table(page: str) -> list[Outcome]:
    """What :func:`table` wrote into a page."""
    inside = page.partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.splitlines() if line[:2] == "| "]
    return [Outcome(name, kind, skip == "yes", reason) for name, kind, skip, reason in rows[1:]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m void_ext.testing.architectures", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, help="write the table between this page's markers")
    parser.add_argument("--only", action="append", help="walk this one (may be given several times)")
    arguments = parser.parse_args()
    if arguments.only and arguments.page:
        parser.error("--only with a page would drop the others from it")
    outcomes = walk(arguments.only, progress=True)
    if arguments.page:
        text = arguments.page.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text:
            parser.error(f"{arguments.page}: expected the markers {BEGIN} and {END}")
        head, _, rest = text.partition(BEGIN)
        arguments.page.write_text(f"{head}{BEGIN}\n{table(outcomes)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return int(any(outcome.kind in ("differs", "breaks") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
