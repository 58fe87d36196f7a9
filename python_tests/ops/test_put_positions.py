"""``put_positions``: ``table[:, start:end] = value`` without torch's slice and copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

_host: Any = pytest.importorskip("void_ext._host")

pytestmark = pytest.mark.skipif(not _host.tensors_visible(), reason="this torch does not show its tensors")


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(0, 3),
    capacity=st.integers(0, 6),
    rest=st.lists(st.integers(0, 4), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16]),
    kind=st.sampled_from(["each", "one for all", "number"]),
    data=st.data(),
)
def test_as_torch_writes(batch: int, capacity: int, rest: list[int], dtype: torch.dtype, kind: str, data: Any) -> None:
    start = data.draw(st.integers(0, capacity))
    end = data.draw(st.integers(start, capacity))
    found = torch.randint(0, 2, (batch, capacity, *rest)).to(dtype)
    expected = found.clone()
    if kind == "number":
        value = data.draw(st.sampled_from([True, False, -1, 7] if dtype is torch.int64 else [True, False]))
        known = dtype in (torch.int64, torch.bool)
    else:
        shape = (batch, end - start, *rest) if kind == "each" else tuple(rest)
        value, known = torch.randint(0, 2, shape).to(dtype), True
    expected[:, start:end] = value
    assert _host.put_positions(found, start, end, value) is known
    if known:
        assert torch.equal(found, expected)


def test_what_torch_has_to_do() -> None:
    table = torch.full((2, 4, 3), -7.0)
    value = torch.zeros(2, 1, 3)
    others = {
        "another dtype": value.double(),
        "another shape": torch.zeros(2, 2, 3),
        "what broadcasts in another way": torch.zeros(1),
        "rows apart": torch.zeros(2, 1, 6)[..., :3],
        "another device": torch.empty(2, 1, 3, device="meta"),
        "a subclass": torch.nn.Parameter(value),
        "a number for a table of others": 0,
        "text": "0",
        "nothing": None,
    }
    for what, given_value in others.items():
        assert not _host.put_positions(table, 1, 2, given_value), what
    for start, end in ((-1, 0), (3, 2), (4, 5), (2**40, 2**40 + 1)):
        assert not _host.put_positions(table, start, end, value), (start, end)
    assert not _host.put_positions(torch.zeros(2, dtype=torch.int64), 0, 1, 0)
    assert not _host.put_positions(torch.zeros(2, 4, dtype=torch.int64), 0, 1, 2**70)
    assert not _host.put_positions(torch.zeros(4, 2, dtype=torch.int64).T, 0, 1, 0)
    assert (table == -7).all()
