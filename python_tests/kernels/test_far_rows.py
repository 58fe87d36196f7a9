"""Rows more than 2**31 elements apart: every offset is 64 bits wide. The memory in between is never touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.hostshim import Modes
from void_ext.testing import assert_bits_equal

WIDTH = 72
APART = 2**31 + 8


@pytest.fixture
def far():
    """far(values): the same two rows, APART elements from each other."""

    def make(values: Tensor) -> Tensor:
        try:
            memory = torch.empty(APART + WIDTH, dtype=values.dtype)
        except RuntimeError as error:  # address space alone is asked for, but a container may count it
            pytest.skip(f"no address space: {error}")
        view = memory.as_strided((2, WIDTH), (APART, 1))
        view.copy_(values)
        return view

    return make


@pytest.mark.parametrize("operand", ["residual", "update", "out", "normed", "kept"])
def test_each_operand_of_an_add(shim, values, far, operand):
    rows = {
        "residual": values(2, WIDTH, torch.bfloat16),
        "update": values(2, WIDTH, torch.bfloat16, seed=1),
        "out": torch.zeros(2, WIDTH, dtype=torch.bfloat16),
        "normed": torch.zeros(2, WIDTH, dtype=torch.bfloat16),
        "kept": torch.zeros(2, WIDTH, dtype=torch.bfloat16),
    }
    weight = values(1, WIDTH, torch.bfloat16, seed=2)[0]

    def run(rows: dict[str, Tensor]) -> list[Tensor]:
        table, active = torch.zeros(2, 2), torch.empty(2, dtype=torch.bool)
        modes = Modes(alpha=0.8, active=active, kept=rows["kept"])
        shim.add_rms_norm(
            rows["residual"], rows["update"], weight, 1e-5, rows["out"], rows["normed"], table[:, 1], None, modes
        )
        assert bool(active.all())  # from nothing to something
        return [rows[name].clone() for name in ("out", "normed", "kept")] + [table]

    near = run({name: value.clone() for name, value in rows.items()})
    for left, right in zip(run({**rows, operand: far(rows[operand])}), near, strict=True):
        assert_bits_equal(left, right)


def test_rows_and_flags_of_the_others(shim, values, far):
    stream, update = values(2, WIDTH, torch.bfloat16), values(2, WIDTH, torch.bfloat16, seed=1)
    on = torch.tensor([False, True])
    for source in (far(stream), stream):
        norms, out = torch.empty(2), torch.empty_like(stream)
        shim.row_l2norm(source, norms)
        both = torch.zeros(2, 2)
        shim.streams_l2norm([update, source], both)
        assert_bits_equal(both[:, 1].clone(), norms)
        shim.keep_rows(source, update, on, out)
        kept = torch.zeros_like(stream)
        shim.exit_select(kept, source, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0, 0.8)
        torch.testing.assert_close(norms, torch.linalg.vector_norm(stream.float(), dim=1))
        assert_bits_equal(out, torch.where(on[:, None], stream + update, stream))
        assert_bits_equal(kept, torch.where(torch.tensor([[True], [False]]), stream, 0))
    index, count = torch.tensor([1, 0]), torch.tensor([2])
    packed = torch.empty_like(stream)
    shim.gather_rows(far(stream), index, count, packed)
    assert_bits_equal(packed, stream.flip(0))
    target = far(torch.zeros_like(stream))
    shim.scatter_rows(target, packed, index, count)
    assert_bits_equal(target.clone(), stream)
