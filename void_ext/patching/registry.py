"""Which layers may run our fused forward: only those whose own forward is known to mean the same.

Known means: the syntax tree of the class's ``forward``, as installed, hashes to a value listed here. A release that
changes a forward, a subclass that overrides it, a library that replaced or wrapped it on the class (Liger) or on the
instance: each falls back to the generic adapter, with the reason in ``handle.describe()``. accelerate's hooks, which
keep a layer's own forward as ``_old_forward``, are looked through.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerForm:
    """x + attention(norm(x)), then x + mlp(norm(x)): which of a layer's modules these are, and what else it does.

    Attributes:
        attention, mlp: the halves; of a tuple that one gives, the first part is its update.
        input_norm, post_norm: before attention and MLP; None: the half reads the stream itself.
        attention_after, mlp_after: what an update goes through before it is added: a norm, or a dropout.
        scale: the layer's attribute that updates are multiplied with at last.
        passes_rest: whether attention gets the arguments too that the layer's forward does not name.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    input_norm: str | None = "input_layernorm"
    post_norm: str | None = "post_attention_layernorm"
    attention_after: tuple[str, ...] = ()
    mlp_after: tuple[str, ...] = ()
    scale: str | None = None
    passes_rest: bool = True

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of all modules it calls."""
        names = (self.attention, self.mlp, self.input_norm, self.post_norm, *self.attention_after, *self.mlp_after)
        return tuple(name for name in names if name is not None)

    @property
    def pre_norm(self) -> bool:
        """Whether there is nothing to it but the two norms before the halves."""
        return self == LayerForm(self.attention, self.mlp, self.input_norm or "", self.post_norm or "")


_PRE_NORM = LayerForm()
_POST_NORM = LayerForm(
    input_norm=None,
    post_norm=None,
    attention_after=("post_attention_layernorm",),
    mlp_after=("post_feedforward_layernorm",),
)
_FOUR_NORMS = LayerForm(
    post_norm="pre_feedforward_layernorm",
    attention_after=("post_attention_layernorm",),
    mlp_after=("post_feedforward_layernorm",),
)

#: digest of a layer's forward -> its form
LAYER_FORWARDS: dict[str, LayerForm] = {
    "8baa10e6eeda8e23": _PRE_NORM,  # transformers 4.57 and 5.0: llama, mistral, qwen2 and many others
    "3cfc8a7623e0ffb2": _PRE_NORM,  # 5.8 to 5.23: the same
    "0d1a8e74f7c2c571": LayerForm(mlp="block_sparse_moe"),  # mixtral in 4.57
    "e80d5460319f0da7": _PRE_NORM,  # mixtral, minimax_m2, phimoe
    "219f8191134c46a1": _PRE_NORM,  # gpt_oss
    "77000d1a3f056764": LayerForm(input_norm="attention_layernorm", post_norm="feedforward_layernorm"),  # apertus
    "1a789f8eed70d524": LayerForm(post_norm="pre_feedforward_layernorm"),  # vaultgemma
    "ec2845de4840f7ed": LayerForm(attention="self_attention"),  # jetmoe
    "f415fe06b28ecc1b": LayerForm(passes_rest=False),  # nemotron
    "26cadfe4da573317": LayerForm(attention_after=("resid_attn_dropout",), mlp_after=("resid_mlp_dropout",)),  # phi3
    "69418627a509a069": LayerForm(  # the same in 4.57
        attention_after=("resid_attn_dropout",), mlp_after=("resid_mlp_dropout",)
    ),
    "3dcc98bc573571a9": LayerForm(attention_after=("dropout",), mlp_after=("dropout",)),  # emu3
    "c19975aaedc21d99": LayerForm(mlp_after=("dropout",)),  # persimmon
    "8961432b77e230ea": _FOUR_NORMS,  # gemma2, gemma3
    "2666bb017e42f5b9": LayerForm(  # afmoe
        post_norm="pre_mlp_layernorm", attention_after=("post_attention_layernorm",), mlp_after=("post_mlp_layernorm",)
    ),
    "5d4a17c5c8b4af06": LayerForm(  # glm4
        attention_after=("post_self_attn_layernorm",), mlp_after=("post_mlp_layernorm",)
    ),
    "a7b6a62152d2ee88": _POST_NORM,  # olmo2 and others in 4.57
    "117815e7edd2a393": _POST_NORM,  # olmo2, olmo3, exaone4
    "7dd449abddf156c7": _POST_NORM,  # flex_olmo
    "77fe64b658d53ece": LayerForm(scale="residual_multiplier"),  # granite
    "b199b7349e90e01a": LayerForm(mlp="block_sparse_moe", scale="residual_multiplier"),  # granitemoe
    "58e1accb41b57631": LayerForm(scale="residual_scale"),  # minicpm3
    "f02a95811257d9e4": LayerForm(  # hyperclovax
        attention_after=("post_norm1",), mlp_after=("post_norm2",), scale="residual_multiplier"
    ),
}


@dataclass(frozen=True)
class NormForm:
    """An RMSNorm that `add_rms_norm` computes: where its eps is, and whether its weight is zero-centred."""

    eps: str
    zero_centered: bool

    def weight_fits(self, weight: Tensor, rows: Tensor) -> bool:
        """Whether the module, too, would give the dtype of ``rows``."""
        return weight.dtype == rows.dtype or (self.zero_centered and weight.dtype == torch.float32)


#: digests of an RMSNorm's forward, and of the ``_norm`` that it calls where it has one -> its form
RMS_NORM_FORWARDS: dict[tuple[str, ...], NormForm] = {
    ("cd226623731333c3",): NormForm("variance_epsilon", zero_centered=False),  # weight * round(x * rsqrt(...)): llama
    ("337af6ec4335ffcf", "e4425ab3fca6ff86"): NormForm(
        "eps", zero_centered=True
    ),  # round(x * rsqrt(...) * (1 + weight))
}


def digest(function: Any) -> str:
    """A hash of what a function does: its parameters' names and its statements, without comments, types, docstring.

    Raises OSError or TypeError where the source cannot be had.
    """
    return _digest(unwrapped(function))


def unwrapped(function: Any) -> Any:
    """What transformers' own decorators stand around; they leave alone what a forward computes (torch's need not)."""
    while hasattr(function, "__wrapped__"):
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        if not file.startswith(_DECORATORS):
            raise TypeError(f"wrapped in {file or type(function).__name__}")
        function = function.__wrapped__
    return function


_DECORATORS = tuple(str(Path(transformers.__file__ or "").parent / name) for name in ("utils", "modeling_layers.py"))


def own_forward(module: nn.Module) -> Any:
    """The class's forward where that is what a module runs, accelerate's hooks around it or not; None elsewhere."""
    own, placed = type(module).forward, module.__dict__
    if "forward" not in placed:
        return own
    # transformers 4.57 leaves the class's own on the instance when it has captured hidden states.
    inner = placed.get("_old_forward" if "_hf_hook" in placed else "forward")
    same = getattr(inner, "__func__", None) is own and getattr(inner, "__self__", None) is module
    return own if same else None


@lru_cache(maxsize=256)
def _digest(function: Any) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise TypeError(f"{function} is not a plain function")
    return digest_of_source(tree)


def digest_of_source(tree: ast.FunctionDef) -> str:
    """:func:`digest` of a function that was parsed and not imported."""
    if any(argument.arg == "cache" for argument in tree.args.args):
        tree = _Renamed().visit(copy.deepcopy(tree))
    body = tree.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    names = [argument.arg for argument in tree.args.args] + [tree.args.kwarg.arg if tree.args.kwarg else ""]
    text = ",".join(names) + "\n" + "\n".join(ast.unparse(statement) for statement in body)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Renamed(ast.NodeTransformer):
    """Undoes what transformers 5.24 changed in most forwards: the cache is called ``cache``, and gets the rest of the
    forward's arguments, of which the caches that we know read nothing."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.arg = "past_key_values" if node.arg == "cache" else node.arg
        return node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = "past_key_values" if node.id == "cache" else node.id
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "update":
            node.keywords = [word for word in node.keywords if word.arg != "kwargs"]
        for word in node.keywords:
            word.arg = "past_key_values" if word.arg == "cache" else word.arg
        return self.generic_visit(node)


def layer_form(layer: nn.Module) -> tuple[LayerForm | None, str]:
    """The form of ``layer``'s forward, or None, and the reason in words."""
    name = type(layer).__name__
    forward = own_forward(layer)
    if forward is None:
        return None, f"{name}.forward was replaced on the instance"
    try:
        found = digest(forward)
    except (OSError, TypeError, SyntaxError) as error:
        return None, f"the source of {name}.forward is not available ({error})"
    form = LAYER_FORWARDS.get(found)
    if form is None:
        return None, f"{name}.forward ({found}) is not one of the forwards known"
    for part in form.modules:
        if not isinstance(getattr(layer, part, None), nn.Module):
            return None, f"{name} has no module {part}"
    if form.scale is not None and not isinstance(getattr(layer, form.scale, None), (int, float)):
        return None, f"{name} has no number {form.scale}"
    return form, f"{name}.forward ({found}) is known"


def common_form(layers: Iterable[nn.Module]) -> tuple[LayerForm | None, str]:
    """One form for all layers, or None and why the first that has none, or another, has it."""
    form, why = None, ""
    for index, layer in enumerate(layers):
        before = form
        form, why = layer_form(layer)
        if form is None:
            break
        if index and form != before:
            return None, f"the {type(layer).__name__} of layer {index} is of another form than the layers before it"
    return form, why


def rms_norm_form(norm: nn.Module | None) -> NormForm | None:
    """The form of ``norm``, if its own forward is one of the known formulas and nobody has replaced it."""
    if norm is None or "forward" in norm.__dict__:
        return None
    functions = [type(norm).forward, *filter(None, [getattr(type(norm), "_norm", None)])]
    try:
        form = RMS_NORM_FORWARDS.get(tuple(digest(function) for function in functions))
    except (OSError, TypeError, SyntaxError):
        return None
    return form if form is not None and hasattr(norm, form.eps) and hasattr(norm, "weight") else None
