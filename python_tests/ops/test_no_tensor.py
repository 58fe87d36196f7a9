"""What is no tensor where one is needed: named, whether grad mode is on or not, and nothing is written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from void_ext import ops
from void_ext.testing import assert_bits_equal


def arguments(op: str) -> dict[str, Any]:
    """Of a call that works."""
    rows = {name: torch.ones(3, 8) for name in ("residual", "update", "stream", "kept", "rows")}
    on = torch.ones(3, dtype=torch.bool)
    index = {"index": torch.arange(3), "count": torch.tensor([3])}
    every = {**rows, **index, "on": on, "norms": torch.zeros(3, 4), "weight": torch.ones(8)}
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "add_l2norm": ("residual update norms", {"column": 1}),
        "add_rms_norm": ("residual update weight", {"eps": 1e-6, "norms": torch.zeros(3, 4), "column": 1}),
        "compact": ("on", {}),
        "exit_select": ("kept stream norms", {"layer": 1, "alpha": 0.8}),
        "gather_rows": ("stream index count", {"capacity": 3}),
        "keep_rows": ("residual update on", {}),
        "row_l2norm": ("stream norms", {"column": 1}),
        "scatter_rows": ("stream rows index count", {}),
        "streams_l2norm": ("norms", {"streams": [torch.ones(3, 8), torch.ones(3, 8)]}),
        "void_mask": ("norms", {"alpha": 0.8}),
    }
    names, others = wanted[op]
    return {**{name: every[name] for name in names.split()}, **others}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("op", ops.__all__)
def test_no_tensor_is_named(op: str, grad: bool) -> None:
    good = arguments(op)
    needed = [name for name, value in good.items() if isinstance(value, torch.Tensor)]
    if op == "add_rms_norm":
        needed.remove("norms")  # None says that nothing is to be recorded
    with torch.set_grad_enabled(grad):
        for name in needed:
            for value in (None, [1.0, 2.0]):
                given = {**arguments(op), name: value}
                before = {key: other.clone() for key, other in given.items() if isinstance(other, torch.Tensor)}
                said = f"void_ext::{op}: {name}: expected a tensor, got {type(value).__name__}"
                with pytest.raises(TypeError, match=re.escape(said)):
                    getattr(ops, op)(**given)
                for key, tensor in before.items():
                    assert_bits_equal(given[key], tensor, key)
        getattr(ops, op)(**good)


def test_streams_are_a_list_of_tensors() -> None:
    norms = torch.zeros(3, 4)
    with pytest.raises(TypeError, match="void_ext::streams_l2norm: streams: expected a list of tensors, got NoneType"):
        ops.streams_l2norm(None, norms)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"void_ext::streams_l2norm: streams\[1\]: expected a tensor, got NoneType"):
        ops.streams_l2norm([torch.ones(3, 8), None], norms)  # type: ignore[list-item]
    assert not bool(norms.any())


def test_options_that_are_no_tensors_are_named_by_torch() -> None:
    given = arguments("add_l2norm")
    for name in ("updates", "on", "out"):
        with pytest.raises(RuntimeError, match=f"argument '{name}' but instead found type 'list'"):
            ops.add_l2norm(**given, **{name: [1.0]})
    assert not bool(given["norms"].any())
