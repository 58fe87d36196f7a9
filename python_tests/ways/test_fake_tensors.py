"""Calls without data: refused by name, and later traces are none the worse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import void_ext
from void_ext.testing import assert_bits_equal

IDS = torch.arange(12).view(2, 6) % 90


def export(model: Any) -> None:
    torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)


def pretend(model: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(IDS), use_cache=False)


def pretend_of_the_body(model: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.model(mode.from_tensor(IDS), use_cache=False)


@pytest.mark.parametrize("call", [export, pretend, pretend_of_the_body])
@pytest.mark.parametrize("mode", ["trace", "skip"])
@torch.no_grad()
def test_fake_tensors_are_refused(mode: str, call: Any, tiny: Any) -> None:
    model = tiny("llama")
    plan = {"plan": void_ext.VoidPlan.from_layers(model, skip=[2])} if mode == "skip" else {}
    with void_ext.patch(model, mode=mode, **plan) as handle:
        model(IDS)
        expected = handle.trace.prompt.norms.clone()
        with pytest.raises(RuntimeError, match="fake tensors"):
            call(model)
        model(IDS)
        assert_bits_equal(handle.trace.prompt.norms, expected, "norms")
