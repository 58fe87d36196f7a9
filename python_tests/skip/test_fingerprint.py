"""Fingerprints: which models a plan is for, and what their layers weigh."""

from __future__ import annotations

import copy
import hashlib
import struct
from typing import Any

import pytest
import torch

import void_ext
from void_ext import VoidPlan
from void_ext.plan import Fingerprint

LAYERS = 8


def test_weights_are_counted_by_half(model: Any) -> None:
    weights = Fingerprint.of(model).weights
    for index, layer in enumerate(model.model.layers):
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in layer.named_children()}
        projections = sum(getattr(layer.self_attn, name).weight.numel() for name in ("k_proj", "v_proj"))
        assert weights.attention[index] == parts["self_attn"] + parts["input_layernorm"]
        assert weights.mlp[index] == parts["mlp"] + parts["post_attention_layernorm"]
        assert weights.project[index] == projections + parts["input_layernorm"]
    assert weights.other == model.lm_head.weight.numel()


@pytest.mark.parametrize(
    ("family", "key_value"),
    [
        ("qwen2", 2 * 16 * 33),
        ("qwen3", 2 * 16 * 32 + 8),
        ("phi3", 2 * 16 * 32),
        ("gpt_neox", 2 * 32 * 33),
        ("opt", 2 * 32 * 33),
    ],
)
def test_weights_of_other_families(family: str, key_value: int, build: Any) -> None:
    model = build(family)
    found = Fingerprint.of(model)
    weights = found.weights
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)[0]
    assert weights.attention[0] + weights.mlp[0] == sum(p.numel() for p in layer.parameters())
    norm = 64 if family in ("gpt_neox", "opt") else 32
    assert weights.project[0] == key_value + norm
    assert found.intermediate_size == 64


def test_norms_are_hashed_as_float32_in_order(model: Any, build: Any) -> None:
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if name.endswith(("layernorm", "norm")):
            digest.update(b"".join(struct.pack("<f", value) for value in module.weight.tolist()))
    assert Fingerprint.of(model).norms == digest.hexdigest()
    # bfloat16 weights are exact in float32: loaded in either dtype they hash alike.
    half = build().bfloat16()
    assert Fingerprint.of(half).norms == Fingerprint.of(copy.deepcopy(half).float()).norms != digest.hexdigest()
    with void_ext.patch(model):
        assert Fingerprint.of(model).norms == digest.hexdigest()


def test_check_accepts_the_model_it_was_made_for(model: Any, recwarn: pytest.WarningsRecorder, build: Any) -> None:
    VoidPlan.from_layers(model, skip=[3]).check(model)
    VoidPlan.from_layers(model, skip=[3]).check(build(seed=0))
    VoidPlan.from_layers(LAYERS, skip=[3]).check(build("qwen2", hidden_size=64))
    assert not recwarn.list


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"layers": 7}, "got layers 7 instead of 8$"),
        (
            "llama",
            {"hidden_size": 64, "vocab_size": 97},
            "hidden_size 64 instead of 32, head_dim 16 instead of 8, vocab_size 97 instead of 96",
        ),
        ("llama", {"intermediate_size": 65}, "intermediate_size 65 instead of 64"),
        ("llama", {"num_key_value_heads": 4}, "kv_heads 4 instead of 2"),
        ("mistral", {}, "got model_type mistral instead of llama"),
    ],
)
def test_check_refuses_another_architecture(
    family: str, changes: Any, message: str, force: bool, model: Any, build: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        VoidPlan.from_layers(model, skip=[3]).check(build(family, **changes), force=force)


def test_check_refuses_another_checkpoint_unless_forced(model: Any, build: Any) -> None:
    plan = VoidPlan.from_layers(model, skip=[3])
    with pytest.raises(ValueError, match=r"norm weights are not those of the model the plan was made for.*force"):
        plan.check(build(seed=1))
    plan.check(build(seed=1), force=True)
    with pytest.raises(ValueError, match="made for 8 layers, got 7"):
        VoidPlan.dense(LAYERS).check(build(layers=7), force=True)
    with pytest.raises(TypeError, match="force: expected True or False, got str 'yes'"):
        plan.check(model, force="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a transformers model"):
        plan.check(torch.nn.Linear(2, 2))


def test_matrices_are_not_looked_at(model: Any, build: Any) -> None:
    """As docs/plans.md says: a fine-tune that left the norm weights alone is the same model to a plan."""
    plan, tuned = VoidPlan.from_layers(model, skip=[3]), build()
    for layer in tuned.model.layers:
        torch.nn.init.normal_(layer.mlp.up_proj.weight)
    plan.check(tuned)


def test_quantised_variants_only_warn(model: Any, recwarn: pytest.WarningsRecorder, build: Any) -> None:
    plan = VoidPlan.from_layers(model, skip=[3])
    other = build(seed=1)
    other.config.quantization_config = {"quant_method": "some"}
    with pytest.warns(UserWarning, match="made for an unquantised model, this is a quantised one, its norm weights"):
        plan.check(other)
    same = build()
    same.config.quantization_config = {"quant_method": "some"}
    with pytest.warns(UserWarning, match="made for an unquantised model, this is a quantised one; voids may differ"):
        plan.check(same)
    with pytest.warns(UserWarning, match="made for a quantised model, this is an unquantised one; voids"):
        VoidPlan.from_layers(same).check(model)
    recwarn.clear()
    VoidPlan.from_layers(same).check(same)
    assert not recwarn.list


def test_weights_that_cannot_be_read_only_warn(model: Any, build: Any) -> None:
    with torch.device("meta"):
        empty = build()
    assert Fingerprint.of(empty).norms == ""
    with pytest.warns(UserWarning, match="could not be read"):
        VoidPlan.from_layers(model).check(empty)
