"""What policies decide while a response runs, they decide on the device: nobody waits for it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from python_tests.skip.histories import LAYERS, SIGNALS, history
from void_ext import HaltPlan, History, RefreshPlan, _ranking, policies

WAITING = {"item", "cpu", "tolist", "nonzero", "numpy", "to", "is_nonzero", "equal", "unique", "masked_select"}


def on_the_device() -> list[Callable[..., Any]]:
    found: list[Callable[..., Any]] = [RefreshPlan.decide, RefreshPlan._table, RefreshPlan._updates]
    found += [HaltPlan.decide, HaltPlan.runs, HaltPlan.step, HaltPlan._void]
    found += [value for value in vars(_ranking).values() if inspect.isfunction(value)]
    found += [_ranking.Evidence.pooled, _ranking.Evidence.__add__]
    return [function for function in found if function.__module__.startswith((policies.__name__, _ranking.__name__))]


@pytest.mark.parametrize("function", on_the_device(), ids=lambda function: function.__qualname__)
def test_source_asks_the_device_for_nothing(function: Callable[..., Any]) -> None:
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Attribute):
            assert node.attr not in WAITING, ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("bool", "int", "float", "any", "all", "max", "min"), ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.tensor", "torch.as_tensor"):
            pytest.fail("a copy from the host waits too: " + ast.unparse(node))
        if isinstance(node, ast.Subscript):  # indexing by a mask asks how many
            assert "mask" not in ast.unparse(node.slice), ast.unparse(node)


@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_tables_without_data(granularity: str, signal: str) -> None:
    """On tensors without content, whatever would read one raises; two alike on any device."""
    with FakeTensorMode() as mode:
        past = history(prompt=3, response=1)
        assert past.updates is not None
        with pytest.raises(DataDependentOutputException):
            bool(past.mask.any())
        policy = RefreshPlan(3, granularity=granularity, signal=signal, budget=2, at_least=1)
        policy.decide(past, "response")
        table = policy.decide(past, "response")
        assert isinstance(table, Tensor)
        assert (table.shape, table.dtype, table.device) == ((3, LAYERS), torch.bool, past.norms.device)
        halted = torch.zeros(3, dtype=torch.bool)
        halted = HaltPlan(budget=4).step(past.norms[:, -1], past.executed[:, -1], halted, 5, LAYERS)
        assert halted.shape == (3,)
    del mode


@pytest.mark.parametrize("granularity", ["token", "batch"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_device_is_not_waited_for(device: torch.device, granularity: str, signal: str) -> None:
    past = history(prompt=3, response=1, padded=False)
    assert past.updates is not None
    tables = (table.to(device) for table in (past.norms, past.executed, past.mask, past.updates))
    there = History(*tables, past.phases)
    options: dict[str, Any] = {"granularity": granularity, "signal": signal, "alpha": 0.1, "budget": 3}
    found = []
    for where in (past, there):
        policy = RefreshPlan(3, **options)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            policy.decide(where, "response")
            table = policy.decide(where, "response")
            assert isinstance(table, Tensor)
            halted = torch.zeros(3, dtype=torch.bool, device=where.norms.device)
            for layer in range(LAYERS):
                halted = HaltPlan(0.1).step(where.norms[:, -1], where.executed[:, -1], halted, layer)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        found.append((table.tolist(), halted.tolist()))
    assert found[0] == found[1]
