"""Tables that the adds and row_l2norm write one column of: any strides in which no two elements are one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from void_ext import ops
from void_ext.testing import assert_bits_equal

ROWS, COLUMNS, COLUMN = 7, 5, 3

TABLES: dict[str, Callable[[], Tensor]] = {
    "by column": lambda: torch.full((COLUMNS, ROWS + 2), -7.0).t(),
    "by column, with gaps": lambda: torch.full((COLUMNS, 40), -7.0)[:, : 2 * ROWS : 2].t(),
    "every second column": lambda: torch.full((ROWS + 1, 2 * COLUMNS), -7.0)[:, ::2],
    "one row apart from the next": lambda: torch.full((ROWS, 3 * COLUMNS), -7.0)[:, COLUMNS : 2 * COLUMNS],
}


def on(device: torch.device, table: Tensor) -> Tensor:
    """The same strides on another device."""
    memory = torch.full(
        (1 + sum((size - 1) * step for size, step in zip(table.shape, table.stride(), strict=True)),), -7.0
    )
    return memory.to(device).as_strided(table.shape, table.stride())


@pytest.mark.parametrize("name", list(TABLES))
@pytest.mark.parametrize("op", ["add_l2norm", "add_rms_norm", "row_l2norm"])
def test_one_column_is_written_wherever_it_lies(device, dtype, op: str, name: str, random_rows) -> None:
    residual, update = (random_rows(ROWS, 577, seed=seed) for seed in (1, 2))
    weight = torch.ones(577, dtype=dtype, device=device)

    def run(norms: Tensor, updates: Tensor) -> None:
        if op == "add_l2norm":
            ops.add_l2norm(residual, update, norms, COLUMN, updates)
        elif op == "add_rms_norm":
            ops.add_rms_norm(residual, update, weight, 1e-5, norms, COLUMN, updates)
        else:
            ops.row_l2norm(residual, norms, COLUMN)

    straight = [torch.full((ROWS, COLUMNS), -7.0, device=device) for _ in range(2)]
    run(*straight)
    assert bool((straight[0][:, COLUMN] > 0).all())
    tables = [on(device, TABLES[name]()) for _ in range(2)]
    run(*tables)
    for got, expected in zip(tables, straight, strict=True):
        assert_bits_equal(got[:ROWS], expected, name)
        assert bool((got[ROWS:] == -7.0).all())


@pytest.mark.parametrize("count", [2, 3])  # the table has three rows
@pytest.mark.parametrize("strides", [(2, 1), (1, 2), (0, 1), (1, 0), (3, 1), (1, 1)], ids=str)
def test_no_two_elements_may_be_one(device, strides: tuple[int, int], count: int) -> None:
    rows, norms = torch.ones(count, 8, device=device), torch.ones(16, device=device).as_strided((3, 4), strides)
    for write in (lambda: ops.add_l2norm(rows, rows, norms, 2), lambda: ops.row_l2norm(rows, norms, 2)):
        with pytest.raises(ValueError, match="norms: expected rows that share no element, got shape"):
            write()
    assert bool((norms == 1).all())


def test_a_verdict_reads_along_the_rows(device) -> None:
    rows, norms = torch.ones(3, 8, device=device), torch.ones(4, 3, device=device).t()
    active = torch.zeros(3, dtype=torch.bool, device=device)
    with pytest.raises(
        ValueError, match=r"norms: expected neighbouring columns \(stride 1\) beside active or kept, got"
    ):
        ops.add_l2norm(rows, rows, norms, 2, alpha=0.8, active=active)
    assert bool((norms == 1).all())
