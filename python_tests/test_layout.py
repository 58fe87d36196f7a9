"""One op, one stem: every op has its kernel, checks, CPU kernel, fake, wrapper, reference, tests and benchmark."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from void_ext import ops, reference

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(ops.__all__)


def registered() -> list[str]:
    """Without the overloads, which share everything with their op."""
    return sorted(
        {
            name.removeprefix("void_ext::").split(".")[0]
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("void_ext::")
        }
    )


def test_wrappers_references_and_registered_ops_are_the_same_set() -> None:
    assert registered() == OPS
    plans = {"PlanResult", "run_plan"}
    assert sorted({*reference.__all__} - plans) == OPS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "path",
    [
        "csrc/kernels/{}.cuh",
        "csrc/ops/{}.cpp",
        "csrc/cpu/{}.h",
        "void_ext/ops/_{}.py",
        "python_tests/ops/test_{}.py",
        "python_tests/kernels/test_{}.py",
    ],
)
def test_has_its_file(op: str, path: str) -> None:
    assert (ROOT / path.format(op)).is_file()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("path", ["csrc/launch.h", "csrc/launch.cu", "bench/op_cases.py", "void_ext/_fake.py"])
def test_is_named_in(op: str, path: str) -> None:
    assert re.search(rf"\b(launch_)?{op}\b", (ROOT / path).read_text())


@pytest.mark.parametrize("op", OPS)
def test_is_compiled(op: str) -> None:
    assert f"csrc/ops/{op}.cpp" in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.parametrize("op", OPS)
def test_has_a_fake_kernel(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"void_ext::{op}", "Meta")


@pytest.mark.parametrize("op", OPS)
def test_is_opchecked_and_compiled(op: str) -> None:
    text = (ROOT / f"python_tests/ops/test_{op}.py").read_text()
    assert "torch.library.opcheck(" in text
    assert "torch.compile(" in text
    assert "fullgraph=True" in text


@pytest.mark.parametrize("op", OPS)
def test_wrapper_reference_and_schema_take_the_same(op: str) -> None:
    schema = getattr(torch.ops.void_ext, op).default._schema
    for function in (getattr(ops, op), getattr(reference, op)):
        # What is given by keyword alone goes to the overload `into`.
        all_parameters = inspect.signature(function).parameters
        parameters = {name: one for name, one in all_parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD}
        assert list(parameters) == [argument.name for argument in schema.arguments]
        for argument in schema.arguments:
            default = parameters[argument.name].default
            expected = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
            assert default is expected


@pytest.mark.parametrize("op", ["add_l2norm", "add_rms_norm"])
def test_the_overload_takes_what_the_wrapper_does(op: str) -> None:
    schema = getattr(torch.ops.void_ext, op).into._schema
    names = [argument.name for argument in schema.arguments]
    assert [name for name in names if name != "normed"] == list(inspect.signature(getattr(ops, op)).parameters)


@pytest.mark.parametrize("op", OPS)
def test_docstring_says_all_there_is(op: str) -> None:
    text = " ".join((inspect.getdoc(getattr(ops, op)) or "").split())
    for part in ("``", "Args:", "Raises:", "Numerics:", "Cost:", "bytes", "no host sync", "capturable", "Source:"):
        assert part in text, part


def test_kernels_know_no_torch() -> None:
    for folder in ("csrc/kernels", "csrc/cpu"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file():
                assert not re.search(r"#include.*(torch|ATen|c10)/", path.read_text()), path


def test_the_lac_rule_is_written_once() -> None:
    """Only rule.h multiplies alpha with a range."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and path.name != "rule.h":
            assert not re.search(r"alpha\s*\*|\*\s*\w*\.?alpha", path.read_text()), path
