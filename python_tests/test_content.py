"""The hash by which weights are told apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import void_ext
from void_ext._content import content_digest
from void_ext._fingerprint import norm_hash


def test_models_with_the_same_norms_are_told_apart(tiny: Callable[..., Any]) -> None:
    first, second = tiny("llama", seed=0), tiny("llama", seed=1)
    assert norm_hash(first) == norm_hash(second)
    assert content_digest(first) != content_digest(second)
    assert content_digest(first) == content_digest(tiny("llama", seed=0))


def test_a_change_of_any_one_parameter_shows(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    before = content_digest(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(torch.full_like(parameter, 0.25))
            assert content_digest(model) != before, name
            parameter.copy_(kept)
    assert content_digest(model) == before


def test_a_low_rank_update_of_one_matrix_shows(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    before = content_digest(model)
    matrix = model.model.layers[3].self_attn.q_proj.weight
    with torch.no_grad():
        matrix += 0.01 * torch.outer(torch.ones(matrix.shape[0]), torch.linspace(-1, 1, matrix.shape[1]))
    assert content_digest(model) != before


def test_the_sample_reaches_every_column_of_a_wide_matrix() -> None:
    """Even steps through 512 x 512 numbers would read one column alone."""
    layer = nn.Linear(512, 512, bias=False)
    before = content_digest(layer)
    with torch.no_grad():
        for start in range(0, 512, 64):
            layer.weight[:, start : start + 64] += 1
            assert content_digest(layer) != before, start
            layer.weight[:, start : start + 64] -= 1


def test_a_patched_model_and_one_that_has_run_are_the_same(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    before = content_digest(model)
    with void_ext.patch(model), torch.no_grad():
        model(torch.tensor([[1, 5, 7]]))
        assert content_digest(model) == before
    assert content_digest(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.bool])
def test_any_dtype_is_read_as_it_is_stored(dtype: torch.dtype) -> None:
    module = nn.Module()
    numbers = torch.tensor([[0, 1, 1], [1, 0, 0]])
    module.register_buffer("packed", numbers.to(dtype))
    before = content_digest(module)
    assert re.fullmatch("[0-9a-f]{64}", before)
    module.register_buffer("packed", (1 - numbers).to(dtype))
    assert content_digest(module) != before
    module.register_buffer("packed", numbers.to(dtype).t().contiguous().t())
    assert content_digest(module) == before


def test_dtype_and_shape_count_and_what_is_not_stored_does_not() -> None:
    module = nn.Linear(4, 4)
    before = content_digest(module)
    module.register_buffer("angles", torch.ones(3), persistent=False)
    assert content_digest(module) == before
    assert content_digest(module.to(torch.bfloat16)) != before
    zeros, wide = nn.Linear(2, 8, bias=False), nn.Linear(8, 2, bias=False)
    for layer in (zeros, wide):
        nn.init.zeros_(layer.weight)
    assert content_digest(zeros) != content_digest(wide)


def test_weights_that_are_elsewhere_are_known_by_name_and_shape(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    before = content_digest(model)
    assert content_digest(model.to("meta")) != before


def test_the_device_does_not_matter(tiny: Callable[..., Any], device: torch.device) -> None:
    model = tiny("llama")
    assert content_digest(model) == content_digest(tiny("llama").to(device))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        content_digest({})  # type: ignore[arg-type]
