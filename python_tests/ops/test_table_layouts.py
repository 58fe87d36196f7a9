"""Tables that the adds and row_l2norm write one column of: any strides in which no two elements are one, in memory that
nothing else is in."""

from __future__ import annotations

import functools
import itertools
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


def shared(device: torch.device, name: str) -> dict[str, Tensor]:
    """Arguments of which one lies in a table that is written to."""
    memory = torch.arange(1.0, 41.0, device=device).view(8, 5)
    given = {
        "residual": torch.ones(8, 4, device=device),
        "update": torch.ones(8, 4, device=device),
        "weight": torch.ones(4, device=device),
        "norms": torch.zeros(8, 5, device=device),
        "updates": torch.zeros(8, 4, device=device),
    }
    argument, table = name.split(" in ")
    given[table] = memory if table == "norms" else memory[:, 1:]
    given[argument] = memory[2, 1:] if argument == "weight" else memory[:, 1:]
    return given


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, f"{argument} in {table}")
        for op in ("add_l2norm", "add_rms_norm")
        for table in ("norms", "updates")
        for argument in ("residual", "update", *(["weight"] if op == "add_rms_norm" else []))
    ]
    + [("add_l2norm", "norms in updates"), ("add_rms_norm", "norms in updates")],
)
def test_a_table_is_apart_from_all_else(device, op: str, name: str) -> None:
    given = shared(device, name)
    before = {argument: tensor.clone() for argument, tensor in given.items()}
    if op == "add_l2norm":
        del given["weight"]
        write = functools.partial(ops.add_l2norm, column=1, **given)
    else:
        write = functools.partial(ops.add_rms_norm, eps=1e-5, column=1, **given)
    argument, table = name.split(" in ")
    with pytest.raises(ValueError, match=f"{op}: {argument}: expected memory apart from that of {table}, which is"):
        write()
    for argument, tensor in given.items():
        assert_bits_equal(tensor, before[argument], argument)


@pytest.mark.parametrize("lead", [(6,), (1, 6), (2, 3)], ids=str)
def test_a_table_beside_the_rows_of_one_buffer(device, lead: tuple[int, ...]) -> None:
    memory = torch.ones(*lead, 40, device=device)
    norms = memory.view(6, 40)[:, 16:20]
    h = ops.add_l2norm(memory[..., :4], memory[..., 4:8], norms, 1)
    ops.row_l2norm(h, norms, 0)
    assert norms.tolist() == [[4.0, 4.0, 1.0, 1.0]] * 6
    assert bool((memory[..., :16] == 1.0).all())
    with pytest.raises(ValueError, match=r"update: expected memory apart from that of norms, .* got some within its"):
        ops.add_l2norm(memory[..., :4], memory[..., 14:18], norms, 1)


@pytest.mark.parametrize("strides", [(12, 1), (12, 2), (1, 12), (2, 12)], ids=str)
def test_two_tables_in_one_buffer(device, strides: tuple[int, int]) -> None:
    """Side by side, one within the other, in turns: refused where they have an element in common, and only there."""
    rows, places = torch.ones(3, 4, device=device), torch.arange(200)
    found = set()
    for first, second, columns in itertools.product((40, 41), range(20, 80), (2, 4)):
        memory = torch.full((200,), -7.0, device=device)
        shapes = ((3, 4, first), (3, columns, second))
        norms, updates = (memory.as_strided((r, c), strides, start) for r, c, start in shapes)
        here, there = (set(places.as_strided((r, c), strides, start).flatten().tolist()) for r, c, start in shapes)
        if here & there:
            with pytest.raises(ValueError, match="norms: expected memory apart from that of updates"):
                ops.add_l2norm(rows, rows, norms, 2, updates)
            assert bool((memory == -7.0).all())
        else:
            ops.add_l2norm(rows, rows, norms, 2, updates)
            assert norms[:, 2].tolist() == [4.0] * 3
            assert updates[:, 1].tolist() == [2.0] * 3
            assert int((memory == -7.0).sum()) == 194
        found.add(bool(here & there))
    assert found == {True, False}
