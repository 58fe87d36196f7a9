"""run_rows: both ways give the same bits, only rows that are on change, and the way taken is predictable."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import void_ext
from void_ext import dispatch
from void_ext.dispatch import CostModel, default_costs, run_rows
from void_ext.testing import assert_bits_equal

WAYS = ("dense", "gather")
CHEAP_BODY = CostModel(floor=0, per_row=0, per_byte=1e-9, launch=1e-6, width=64, itemsize=4)
DEAR_BODY = CostModel(floor=0, per_row=1.0, per_byte=1e-9, launch=1e-6, width=64, itemsize=4)


class Body:
    """Elementwise, so that a row comes out the same in any company; notes what it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.shapes.append(tuple(rows.shape))
        return torch.tanh(rows) * 3


@pytest.fixture
def body() -> Body:
    return Body()


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True], ids=["no grad", "grad mode"])
def grad_mode(request: pytest.FixtureRequest) -> Iterator[bool]:
    with torch.set_grad_enabled(request.param):
        yield request.param


def mixed(rows: int, device: torch.device) -> Tensor:
    """Every third row is off."""
    return (torch.arange(rows) % 3 != 1).to(device)


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 64), (3, 1, 2, 5), (2, 1)], ids=str)
@pytest.mark.parametrize("method", WAYS)
def test_adds_where_on_and_keeps_where_off(device, dtype, grad_mode, body, shape, method) -> None:
    stream = make(shape, dtype, device)
    flat = stream.view(-1, shape[-1])
    on = mixed(len(flat), device)
    before, count = stream.clone(), int(on.sum())
    result, computed = run_rows(stream, on, body, count=count, method=method)
    expected = torch.where(on[:, None], flat + Body()(flat), flat).view(shape)
    assert_bits_equal(result, expected, "stream")
    assert_bits_equal(stream, before, "the stream that was given")
    assert body.shapes == [shape if method == "dense" else (count, shape[-1])]
    assert computed == (len(flat) if method == "dense" else count)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
@pytest.mark.parametrize("method", WAYS)
def test_strided_streams(device, grad_mode, body, layout, method) -> None:
    stream = {
        "sliced": lambda: make((6, 40), torch.bfloat16, device)[:, 3:36],
        "transposed": lambda: make((4, 3, 40), torch.bfloat16, device).transpose(0, 1),
        "expanded": lambda: make((1, 40), torch.bfloat16, device).expand(6, 40),
    }[layout]()
    on = mixed(stream.shape[:-1].numel(), device)
    result = run_rows(stream, on, body, count=int(on.sum()), method=method).stream
    chosen = on.view(*stream.shape[:-1], 1)
    assert_bits_equal(result, torch.where(chosen, stream + Body()(stream), stream).contiguous(), "stream")


def test_flags_at_any_stride(device, body) -> None:
    stream, table = make((6, 33), torch.float32, device), mixed(24, device).view(6, 4)
    for column in range(4):
        on = table[:, column]
        ways = [run_rows(stream, on, body, count=int(on.sum()), method=way).stream for way in WAYS]
        assert_bits_equal(ways[0], ways[1], f"column {column}")


@pytest.mark.parametrize("method", ["auto", *WAYS])
@pytest.mark.parametrize("shape", [(5, 8), (0, 8), (8,)], ids=str)
def test_nothing_runs_where_no_row_is_on(device, grad_mode, shape, method) -> None:
    stream = make(shape, torch.float32, device)
    on = torch.zeros(shape[:-1] or (1,), dtype=torch.bool, device=device)

    def never(rows: Tensor) -> Tensor:
        raise AssertionError("called")

    result = run_rows(stream, on, never, count=0, method=method)
    assert result.stream is stream
    assert result.rows_computed == 0


@pytest.mark.parametrize("method", ["auto", *WAYS])
def test_all_on_is_the_plain_add(device, dtype, grad_mode, body, method) -> None:
    stream = make((2, 3, 33), dtype, device)
    result, computed = run_rows(stream, torch.ones(6, dtype=torch.bool, device=device), body, count=6, method=method)
    assert_bits_equal(result, stream + Body()(stream))
    assert computed == 6
    assert body.shapes == [(2, 3, 33)]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", WAYS)
def test_an_update_of_a_row_that_is_off_never_leaks(device, dtype, grad_mode, method, poison) -> None:
    """The body makes NaN of what is off, and of nothing else."""
    stream = make((9, 33), dtype, device)
    on = mixed(9, device)
    stream[~on, 0] = -1.0
    stream[on, 0] = 1.0

    def body(rows: Tensor) -> Tensor:
        return torch.where(rows[:, :1] < 0, torch.full_like(rows, poison), rows)

    result = run_rows(stream, on, body, count=int(on.sum()), method=method).stream
    assert_bits_equal(result[~on], stream[~on], "off")
    assert_bits_equal(result[on], stream[on] * 2, "on")


def test_a_stream_of_infinities_and_nan_stays_where_off(device, dtype, body) -> None:
    stream = make((6, 8), dtype, device)
    stream[1], stream[4] = torch.nan, -torch.inf
    on = mixed(6, device)
    with torch.no_grad():
        ways = [run_rows(stream, on, body, count=4, method=way).stream for way in WAYS]
    assert_bits_equal(ways[0], ways[1])
    assert_bits_equal(ways[0][~on], stream[~on])


# --- the count ---


def test_a_cpu_counts_by_itself(body) -> None:
    stream, on = make((6, 8), torch.float32, torch.device("cpu")), mixed(6, torch.device("cpu"))
    assert run_rows(stream, on, body, method="gather").rows_computed == 4
    assert run_rows(stream, ~on, body, method="gather").rows_computed == 2
    assert run_rows(stream, on & ~on, body).rows_computed == 0
    assert run_rows(stream, on | True, body).rows_computed == 6


@pytest.mark.gpu
@pytest.mark.parametrize("on", [False, True, None])
def test_without_a_count_cuda_reads_nothing_back(body, on) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    stream = make((6, 8), torch.float32, device)
    flags = mixed(6, device) if on is None else torch.full((6,), on, device=device)
    expected = torch.where(flags[:, None], stream + Body()(stream), stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                result, computed = run_rows(stream, flags, body)
                known = run_rows(stream, flags, body, count=4, method="gather") if on is None else None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert computed == 6
    assert_bits_equal(result, expected)
    if known is not None:
        assert known.rows_computed == 4
        assert_bits_equal(known.stream, expected)


@pytest.mark.gpu
def test_cuda_cannot_gather_what_nobody_counted(body) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stream, on = torch.ones(3, 8, device="cuda"), torch.ones(3, dtype=torch.bool, device="cuda")
    with pytest.raises(ValueError, match=r"count: expected the number of rows .* mask on cuda:0 is not read back"):
        run_rows(stream, on, body, method="gather")


def test_a_device_without_a_count_cannot_gather(body) -> None:
    """As on CUDA, shown on the only other device that is always there."""
    stream, on = torch.ones(3, 8, device="meta"), torch.ones(3, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match=r"count: expected the number of rows .* mask on meta is not read back"):
        run_rows(stream, on, body, method="gather")
    assert run_rows(stream, on, body).rows_computed == 3
    assert run_rows(stream, on, body, count=2, method="gather").rows_computed == 2
    assert body.shapes == [(3, 8), (2, 8)]


# --- derivatives ---


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_derivatives_are_those_of_the_plain_expression(device, dtype, method) -> None:
    weight = make((8, 8), dtype, device, seed=1).requires_grad_()
    stream = make((3, 2, 8), dtype, device).requires_grad_()
    on = mixed(6, device)

    def body(rows: Tensor) -> Tensor:
        return torch.tanh(rows @ weight)

    plain = torch.where(on.view(3, 2, 1), stream + body(stream), stream)
    expected = torch.autograd.grad(plain.square().sum(), (stream, weight))
    result = run_rows(stream, on, body, count=4, method=method).stream
    for got, wanted in zip(torch.autograd.grad(result.square().sum(), (stream, weight)), expected, strict=True):
        torch.testing.assert_close(got, wanted)


# --- what it costs ---


def test_auto_takes_what_the_costs_say(device, body) -> None:
    stream, on = make((9, 64), torch.float32, device), mixed(9, device)
    with torch.no_grad():
        assert run_rows(stream, on, body, count=6, costs=CHEAP_BODY).rows_computed == 9
        assert run_rows(stream, on, body, count=6, costs=DEAR_BODY).rows_computed == 6


def test_costs_add_up() -> None:
    costs = CostModel(floor=8.0, per_row=2.0, per_byte=0.5, launch=10.0, width=4, itemsize=2)
    assert [costs.body(rows, 4, 2) for rows in (0, 1, 4, 5)] == [8.0, 8.0, 8.0, 10.0]
    assert [costs.body(rows, 8, 2) for rows in (1, 5)] == [32.0, 40.0]  # twice as wide: four times the weights
    assert [costs.body(rows, 4, 4) for rows in (1, 8, 9)] == [16.0, 16.0, 18.0]  # twice the bytes to read
    assert costs.dense(6, 3, 4, 2) == 12.0 + 10.0 + 0.5 * ((2 * 6 + 3) * 8 + 6)
    assert costs.gather(6, 3, 4, 2) == 8.0 + 50.0 + 0.5 * ((2 * 6 + 7 * 3) * 8 + 17 * 6)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_by_default_prefill_gathers_and_decode_does_not(device_type: str) -> None:
    costs = default_costs(device_type)
    itemsize = 4 if device_type == "cpu" else 2
    for width in (576, 4096):
        assert costs.choose(2, 1, width, itemsize) == "dense"
        assert costs.choose(4096, 1024, width, itemsize) == "gather"
        assert costs.choose(4096, 4095, width, itemsize) == "dense"
    assert default_costs(device_type) is costs


def test_more_rows_on_never_turn_dense_into_gather() -> None:
    for costs in (default_costs("cpu"), default_costs("cuda"), CHEAP_BODY, DEAR_BODY):
        for rows in (2, 8, 64, 1024):
            ways = [costs.choose(rows, count, 1024, 2) for count in range(1, rows)]
            assert ways == sorted(ways, reverse=True), (costs, rows)  # gather first, dense after


class Clock:
    """Time passes only where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("floor", "per_row"), [(4.0, 0.5), (1.0, 1.0), (100.0, 0.5)])
def test_measuring_finds_the_line(device, floor: float, per_row: float) -> None:
    clock = Clock()
    seen: set[int] = set()

    def body(rows: Tensor) -> Tensor:
        seen.add(rows.shape[0])
        clock.now += max(floor, per_row * rows.shape[0])
        return rows

    costs = CostModel.measure(body, make((2, 64, 32), torch.bfloat16, device), repeats=3, clock=clock)
    assert seen == {1, 2, 4, 8, 16, 32, 64, 128}
    assert costs.floor == floor
    if floor < 0.5 * per_row * 128:
        assert costs.per_row == pytest.approx(per_row)
    else:  # the line is never seen; at least the largest measured count comes out right
        assert costs.body(128, 32, 2) == floor
    assert (costs.launch, costs.per_byte, costs.width, costs.itemsize) == (0.0, 0.0, 32, 2)


def test_measuring_by_the_real_clock_gives_costs(device) -> None:
    costs = CostModel.measure(lambda rows: rows * 2, make((5, 16), torch.float32, device), repeats=1)
    assert costs.choose(4, 2, 16, 4) in WAYS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"floor": -1.0}, "floor: expected a finite number >= 0, got -1.0"),
        ({"per_row": float("nan")}, "per_row: expected a finite number >= 0, got nan"),
        ({"launch": float("inf")}, "launch: expected a finite number >= 0, got inf"),
        ({"width": 0}, "width: expected a finite number >= 1, got 0"),
    ],
)
def test_costs_are_checked(changes: dict[str, float], message: str) -> None:
    values = {"floor": 1.0, "per_row": 1.0, "per_byte": 1.0, "launch": 1.0, "width": 1, "itemsize": 1, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        CostModel(**values)


def test_measuring_needs_rows() -> None:
    with pytest.raises(
        ValueError, match=re.escape("stream: expected at least one row and one column, got shape [0, 4]")
    ):
        CostModel.measure(lambda rows: rows, torch.ones(0, 4))
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        CostModel.measure(lambda rows: rows, torch.ones(2, 4), repeats=0)


# --- what is refused ---

ON = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stream": torch.ones(())},
            "stream: expected a tensor of floats with at least one dimension, got float32 []",
        ),
        (
            {"stream": torch.ones(3, 4).long()},
            "stream: expected a tensor of floats with at least one dimension, got int64 [3, 4]",
        ),
        ({"on": ON.float()}, "on: expected bool [3] on cpu, a flag for each row of stream, got float32 [3] on cpu"),
        ({"on": ON[:, None]}, "on: expected bool [3] on cpu, a flag for each row of stream, got bool [3, 1] on cpu"),
        ({"on": ON[:2]}, "on: expected bool [3] on cpu, a flag for each row of stream, got bool [2] on cpu"),
        ({"on": ON.to("meta")}, "on: expected bool [3] on cpu, a flag for each row of stream, got bool [3] on meta"),
        ({"count": 4}, "count: expected 0 to 3, the rows of stream, got 4"),
        ({"count": -1}, "count: expected 0 to 3, the rows of stream, got -1"),
        ({"count": 1}, "count: expected 2, the rows that are on, got 1"),
        ({"count": 3}, "count: expected 2, the rows that are on, got 3"),
        ({"method": "sparse"}, "method: expected one of 'auto', 'dense', 'gather', got 'sparse'"),
    ],
)
def test_names_what_is_wrong_before_the_body_runs(body, changes, message) -> None:
    arguments = {"stream": torch.ones(3, 4), "on": ON, "count": 2, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        run_rows(arguments.pop("stream"), arguments.pop("on"), body, **arguments)
    assert body.shapes == []


@pytest.mark.parametrize("count", [True, 2.0, torch.tensor(2)])
def test_a_count_is_an_int(body, count) -> None:
    with pytest.raises(TypeError, match="count: expected a number of rows or None, got"):
        run_rows(torch.ones(3, 4), ON, body, count=count)


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda rows: rows[:1], "body: expected an update of shape"),
        (lambda rows: rows.sum(), "body: expected an update of shape"),
        (lambda rows: rows.double(), "body: expected an update of torch.float32 or narrower, got torch.float64"),
    ],
    ids=["rows", "shape", "dtype"],
)
def test_an_update_must_be_like_what_the_body_got(
    grad_mode, method, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run_rows(torch.ones(3, 4), ON, wrong, method=method)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": None}, "stream: expected a tensor, got NoneType"),
        ({"on": [True, False, True]}, "on: expected a tensor, got list"),
        ({"body": lambda rows: None}, "body: expected it to return a tensor, got NoneType"),
    ],
    ids=["stream", "on", "body"],
)
def test_no_tensor_is_named(grad_mode, body, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        run_rows(**{"stream": torch.ones(3, 4), "on": ON, "body": body, **changes})


@pytest.mark.parametrize("method", WAYS)
def test_a_narrower_update_is_added_as_autocast_would(device, grad_mode, method) -> None:
    stream, on = make((6, 33), torch.float32, device), mixed(6, device)

    def body(rows: Tensor) -> Tensor:
        return (rows * 3).bfloat16()

    result = run_rows(stream, on, body, count=4, method=method).stream
    assert_bits_equal(result, torch.where(on[:, None], stream + body(stream), stream))


def test_public_names() -> None:
    assert void_ext.run_rows is run_rows
    assert void_ext.CostModel is CostModel
    assert dispatch.Dispatched._fields == ("stream", "rows_computed")
