"""Which layers may run our fused forward: only those whose own forward is known to mean the same.

Known means: the syntax tree of the class's ``forward``, as installed, hashes to a value listed here. A release that
changes a forward, a subclass that overrides it, a library that replaced it on the class (Liger) or on the instance
(accelerate): each falls back to the generic adapter, with the reason in ``handle.describe()``.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn


@dataclass(frozen=True)
class PreNormForm:
    """x + attention(norm(x)), then x + mlp(norm(x)): what a pre-norm layer calls and with which arguments."""

    attention: str
    mlp: str
    input_norm: str
    post_norm: str
    arguments: tuple[tuple[str, Any], ...]  # positional order after hidden_states, with defaults; handed to attention


def _llama_form(*names: str) -> PreNormForm:
    arguments = tuple((name, False if name == "use_cache" else None) for name in names)
    return PreNormForm("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", arguments)


#: digest of a layer's forward -> its form. llama, mistral and qwen2 share both.
LAYER_FORWARDS: dict[str, PreNormForm] = {
    # transformers 4.57 and 5.0
    "8baa10e6eeda8e23": _llama_form(
        "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position", "position_embeddings"
    ),
    # transformers 5.8 to 5.23
    "3cfc8a7623e0ffb2": _llama_form(
        "attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"
    ),
}

#: digests of an attention forward whose K and V are rotary(k_proj(x)) and v_proj(x), given to the cache's update; where
#: the attention has a k_norm, rotary(k_norm(k_proj(x))), normed per head
ATTENTION_FORWARDS = frozenset(
    {
        "835f43318dc1eb22",  # transformers 4.57: llama, mistral, qwen2
        "5acb9d544704d799",
        "80ad52bb6aa1fc62",
        "6f87980ac0ee7e42",  # transformers 5.17 to 5.23: the same three
        "f3d3c6d20f5eb730",
        "1a25cc1c6a4b9039",
        "5992781fd240c8a2",  # transformers 5.18: qwen3, qwen3_moe and others with a k_norm
        "e2c02bad13bc4f71",  # seed_oss
        "aeb13b50bc15fc99",  # starcoder2
    }
)

#: digests of an RMSNorm's forward that computes weight * round(x * rsqrt(mean(x^2) + variance_epsilon))
RMS_NORM_FORWARDS = frozenset({"cd226623731333c3"})


def digest(function: Any) -> str:
    """A hash of what a function does: its parameters' names and its statements, without comments, types, docstring.

    Raises OSError or TypeError where the source cannot be had.
    """
    return _digest(inspect.unwrap(function))


@lru_cache(maxsize=256)
def _digest(function: Any) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise TypeError(f"{function} is not a plain function")
    return digest_of_source(tree)


def digest_of_source(tree: ast.FunctionDef) -> str:
    """:func:`digest` of a function that was parsed and not imported."""
    body = tree.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    names = [argument.arg for argument in tree.args.args] + [tree.args.kwarg.arg if tree.args.kwarg else ""]
    text = ",".join(names) + "\n" + "\n".join(ast.unparse(statement) for statement in body)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pre_norm_form(layer: nn.Module) -> tuple[PreNormForm | None, str]:
    """The form of ``layer``'s forward, or None, and the reason in words."""
    name = type(layer).__name__
    if "forward" in layer.__dict__:
        return None, f"{name}.forward was replaced on the instance (accelerate hooks do that)"
    try:
        found = digest(type(layer).forward)
    except (OSError, TypeError, SyntaxError):
        return None, f"the source of {name}.forward is not available"
    form = LAYER_FORWARDS.get(found)
    if form is None:
        return None, f"{name}.forward ({found}) is not one of the forwards known to be pre-norm"
    for part in (form.attention, form.mlp, form.input_norm, form.post_norm):
        if not isinstance(getattr(layer, part, None), nn.Module):
            return None, f"{name} has no module {part}"
    return form, f"{name}.forward ({found}) is known"


def rotary_of(attention: Any) -> Any:
    """The rotary embedding that the forward of an attention class calls, also where a subclass inherits it."""
    return inspect.unwrap(attention.forward).__globals__.get("apply_rotary_pos_emb")


def projects(attention: nn.Module) -> tuple[bool, str]:
    """Whether the K and V of an attention can be made without the rest of it, and the reason in words."""
    name = type(attention).__name__
    if "forward" in attention.__dict__:
        return False, f"{name}.forward was replaced on the instance"
    try:
        found = digest(type(attention).forward)
    except (OSError, TypeError, SyntaxError):
        return False, f"the source of {name}.forward is not available"
    if found not in ATTENTION_FORWARDS or rotary_of(type(attention)) is None:
        return False, f"{name}.forward ({found}) is not one of the attention forwards known"
    return True, f"{name}.forward ({found}) is known"


def is_known_rms_norm(norm: nn.Module) -> bool:
    """Whether calling ``norm`` is exactly the RMSNorm formula, with nothing hooked in before or after."""
    if "forward" in norm.__dict__ or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    try:
        return digest(type(norm).forward) in RMS_NORM_FORWARDS and hasattr(norm, "variance_epsilon")
    except (OSError, TypeError, SyntaxError):
        return False
