"""Rows that are on through a body, rows that are off past it: the one way in which a mixed batch is run.

Two exact ways, told apart by cost alone. Dense: the body gets all rows, and the old stream stays where a row is off.
Gather: the rows that are on are packed, the body gets those, and they go back to their places.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from void_ext import _library
from void_ext._options import check_choice

Body = Callable[[Tensor], Tensor]

METHODS = ("auto", "dense", "gather")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_library.load()

_compact = torch.ops.void_ext.compact.default
_gather_rows = torch.ops.void_ext.gather_rows.default
_keep_rows = torch.ops.void_ext.keep_rows.default
_scatter_rows = torch.ops.void_ext.scatter_rows.default


class Dispatched(NamedTuple):
    """What :func:`run_rows` did.

    Attributes:
        stream: the new stream; the given one itself where no row was on.
        rows_computed: how many rows the body got: 0, those that are on, or all.
    """

    stream: Tensor
    rows_computed: int


@dataclass(frozen=True)
class CostModel:
    """How long either way takes, to tell which is the cheaper.

    A body takes ``max(floor, per_row * n)`` seconds for ``n`` rows: its weights are read however few the rows are. Both
    ways add launches and bytes moved. The body is taken to have weights in proportion to the square of the width.

    Attributes:
        floor: seconds that the body takes for a single row.
        per_row: seconds a row, where there are many.
        per_byte: seconds for each byte that selecting, packing and putting back rows reads or writes.
        launch: seconds that each op outside of the body takes, however small.
        width, itemsize: the rows that ``floor`` and ``per_row`` are for, in elements and bytes an element. At another
            width both change with its square, and ``floor`` with the itemsize too.
    Raises:
        ValueError: a cost is negative or not finite, or ``width`` or ``itemsize`` is below 1.
    """

    floor: float
    per_row: float
    per_byte: float
    launch: float
    width: int
    itemsize: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 1 if field.name in ("width", "itemsize") else 0
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{field.name}: expected a finite number >= {least}, got {value}")

    def body(self, rows: int, width: int, itemsize: int) -> float:
        """Seconds that the body takes for ``rows`` rows."""
        weights = (width / self.width) ** 2
        return weights * max(self.floor * itemsize / self.itemsize, self.per_row * rows)

    def dense(self, rows: int, count: int, width: int, itemsize: int) -> float:
        """Seconds of the dense way: the body on all rows, then ``keep_rows``."""
        moved = (2 * rows + count) * width * itemsize + rows
        return self.body(rows, width, itemsize) + self.launch + moved * self.per_byte

    def gather(self, rows: int, count: int, width: int, itemsize: int) -> float:
        """Seconds of the gather way: ``compact``, ``gather_rows``, the body, an add, a clone, ``scatter_rows``."""
        moved = (2 * rows + 7 * count) * width * itemsize + 17 * rows
        return self.body(count, width, itemsize) + 5 * self.launch + moved * self.per_byte

    def choose(self, rows: int, count: int, width: int, itemsize: int) -> str:
        """``"gather"`` where it is predicted to be faster for ``count`` of ``rows`` rows, else ``"dense"``."""
        sizes = (rows, count, width, itemsize)
        return "gather" if self.gather(*sizes) < self.dense(*sizes) else "dense"

    @classmethod
    def measure(
        cls, body: Body, stream: Tensor, *, repeats: int = 7, clock: Callable[[], float] = time.perf_counter
    ) -> CostModel:
        """Fits the model to a body on this machine, now.

        The body runs on 1 to all rows of ``stream``, each time ``repeats`` times; medians count. ``floor`` is what one
        row takes, ``per_row`` the least squares of relative errors over the row counts that take clearly longer.

        Args:
            body: as for :func:`run_rows`.
            stream: ``(..., D)``, at least one row, float32, float16 or bfloat16, as many rows as are to be expected.
            repeats: timed runs of each kind, >= 1.
            clock: seconds, monotonic.
        Returns:
            The costs for rows like ``stream``'s. Two measurements differ: with measured costs, which way a call takes,
            and so the rounding of its matrix products, hangs on the machine.
        Raises:
            ValueError: no rows, or ``repeats`` below 1.
        Cost: ``8 * (repeats + 1)`` runs of the body at most; waits for the device after each.
        """
        _check_rows(stream)
        if repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {repeats}")
        rows, width = stream.shape[:-1].numel(), stream.shape[-1]
        if rows == 0 or width == 0:
            raise ValueError(f"stream: expected at least one row and one column, got shape {list(stream.shape)}")

        def seconds(run: Callable[[], object]) -> float:
            taken = []
            for _ in range(repeats + 1):
                start = clock()
                run()
                if stream.device.type != "cpu":
                    torch.accelerator.synchronize(stream.device)
                taken.append(clock() - start)
            return statistics.median(taken[1:])  # the first one warms up

        with torch.no_grad():
            flat = stream.reshape(rows, width)
            counts = sorted({1, *(max(1, rows >> shift) for shift in range(7))})
            times = {count: seconds(lambda count=count: body(flat[:count])) for count in counts}  # type: ignore[misc]
            launch = seconds(lambda: flat[:1] + flat[:1])
            copied = max(0.0, seconds(lambda: flat.clone()) - launch)
        floor = times[1]
        slopes = [count / taken for count, taken in times.items() if taken > 1.25 * floor]
        per_row = sum(slopes) / sum(slope * slope for slope in slopes) if slopes else times[rows] / rows
        per_byte = copied / (2 * flat.numel() * flat.element_size())
        return cls(floor, per_row, per_byte, launch, width, flat.element_size())


_COSTS = {
    # The MLP half of a Llama layer 2048 wide, 7168 between, in float32 on two cores of a Zen 4, rounded: floor, per_row
    # (on one core, halved) and launch as measured; per_byte between a cached copy and one to fresh pages.
    "cpu": CostModel(floor=10e-3, per_row=0.75e-3, per_byte=2e-10, launch=5e-6, width=2048, itemsize=4),
    # The MLP half of Llama-3-8B in bfloat16 on an H200: computed, from 4 TB/s and 600 TFLOP/s; not measured.
    "cuda": CostModel(floor=88e-6, per_row=0.6e-6, per_byte=2.5e-13, launch=5e-6, width=4096, itemsize=2),
}


def default_costs(device_type: str) -> CostModel:
    """The costs that :func:`run_rows` reckons with by default: constants, the same on every machine.

    The way that is taken decides the shapes of the body's matrix products, hence their rounding. So it must not depend
    on how fast a machine happens to be: same input, same result. :meth:`CostModel.measure` trades that for speed.

    Args:
        device_type: ``"cpu"``; every other is taken for a GPU.
    """
    return _COSTS["cpu" if device_type == "cpu" else "cuda"]


def run_rows(
    stream: Tensor,
    on: Tensor,
    body: Body,
    *,
    count: int | None = None,
    method: str = "auto",
    costs: CostModel | None = None,
) -> Dispatched:
    r"""Adds a body's update to the rows that are on, and leaves the others as they are.

    ``stream[i] + body(stream)[i]`` where ``on[i]``, ``stream[i]`` elsewhere

    No row on: the body is not called. All on: ``stream + body(stream)``. Mixed: the cheaper of two exact ways by
    ``costs``, ``"dense"`` (all rows through the body) or ``"gather"`` (exactly ``count`` rows through it).

    Args:
        stream: ``(..., D)``; ``rows`` is the product of the leading dimensions. float32, float16 and bfloat16 on CPU
            and CUDA take the package's ops; everything else, and everything in grad mode, plain torch.
        on: ``(rows,)`` bool on the same device.
        body: returns the update of what it gets: the stream in its own shape, or ``(count, D)``, packed. It must be
            row-wise: a row's update may not depend on which other rows are there.
        count: how many are on, where the host knows. None: on a CPU they are counted; elsewhere nothing is read back,
            so all rows run. A wrong count is an error on a CPU and not noticed elsewhere, where it makes the result
            wrong.
        method: ``"auto"``, or one of the ways for a mixed batch.
        costs: what ``"auto"`` reckons with; None: :func:`default_costs`, the same on every machine.
    Returns:
        The new stream, and how many rows the body got. Where no row is on, ``stream`` itself, not a copy.
    Raises:
        TypeError: ``stream``, ``on`` or what the body returned is no tensor, or ``count`` no number.
        ValueError: an argument of another shape, dtype, device or range, or an update that is not like what the body
            got; names it, what was expected and what came. Also ``method="gather"`` where nobody knows the count.
    Numerics: rows that are off keep their bits, whatever the body made of them; rows that are on are bit for bit
        ``torch.add``. Both ways agree to the bit where the body's rounding does not depend on how many rows it gets;
        matrix products' does.
    Cost: dense adds one launch and 6D + 1 bytes a row in bfloat16 at most; gather five launches. No host sync off the
        CPU; capturable. The backward pass is torch's own: where a body's derivative is infinite in a row that is off,
        the dense way makes NaN of it, as torch.where does.
    """
    _check_rows(stream)
    if not isinstance(on, Tensor):
        raise TypeError(f"on: expected a tensor, got {type(on).__name__}")
    check_choice("method", method, METHODS)
    rows = stream.shape[:-1].numel()
    if on.dtype != torch.bool or on.shape != (rows,) or on.device != stream.device:
        raise ValueError(
            f"on: expected bool [{rows}] on {stream.device}, a flag for each row of stream, "
            f"got {_kind(on)} on {on.device}"
        )
    count = _count(on, count)
    if count == 0:
        return Dispatched(stream, 0)
    if count == rows:
        return Dispatched(stream + _update(body, stream), rows)
    if count is None:
        if method == "gather":
            raise ValueError(
                f"count: expected the number of rows that are on, got None: method='gather' packs exactly as many, and "
                f"a mask on {stream.device} is not read back. Pass count, or method='dense'"
            )
        method = "dense"
    elif method == "auto":
        reckoned = costs if costs is not None else default_costs(stream.device.type)
        method = reckoned.choose(rows, count, stream.shape[-1], stream.element_size())

    native = not torch.is_grad_enabled() and stream.dtype in _DTYPES and stream.device.type in _native_devices()
    if count is None or method == "dense":
        return Dispatched((_dense if native else _plain_dense)(stream, on, body), rows)
    return Dispatched((_gather if native else _plain_gather)(stream, on, body, count), count)


def _dense(stream: Tensor, on: Tensor, body: Body) -> Tensor:
    kept: Tensor = _keep_rows(stream, _update(body, stream), on)
    return kept


def _gather(stream: Tensor, on: Tensor, body: Body, count: int) -> Tensor:
    index, _, found = _compact(on)
    rows = _gather_rows(stream, index, found, count)
    result = stream.clone(memory_format=torch.contiguous_format)
    _scatter_rows(result, rows + _update(body, rows), index, found)
    return result


def _plain_dense(stream: Tensor, on: Tensor, body: Body) -> Tensor:
    return torch.where(on.view(*stream.shape[:-1], 1), stream + _update(body, stream), stream)


def _plain_gather(stream: Tensor, on: Tensor, body: Body, count: int) -> Tensor:
    flat = stream.reshape(on.shape[0], stream.shape[-1])
    # A stable sort instead of nonzero, which would wait for the device.
    index = torch.argsort(on.to(torch.uint8), descending=True, stable=True)[:count]
    rows = flat.index_select(0, index)
    return flat.index_copy(0, index, rows + _update(body, rows)).view(stream.shape)


def _update(body: Body, rows: Tensor) -> Tensor:
    """``body(rows)`` in the dtype of ``rows``; a narrower one, as autocast leaves it, widens as in a plain add."""
    update = body(rows)
    if not isinstance(update, Tensor):
        raise TypeError(f"body: expected it to return a tensor, got {type(update).__name__}")
    if update.shape != rows.shape or update.device != rows.device:
        raise ValueError(
            f"body: expected an update of shape {list(rows.shape)} on {rows.device}, like the rows it got, "
            f"got shape {list(update.shape)} on {update.device}"
        )
    if update.dtype != rows.dtype:
        if torch.promote_types(update.dtype, rows.dtype) != rows.dtype:
            raise ValueError(f"body: expected an update of {rows.dtype} or narrower, got {update.dtype}")
        update = update.to(rows.dtype)
    return update


def _count(on: Tensor, count: int | None) -> int | None:
    """``count``, checked as far as that costs nothing; counted on a CPU."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
        raise TypeError(f"count: expected a number of rows or None, got {type(count).__name__} {count!r}")
    if count is not None and not 0 <= count <= on.shape[0]:
        raise ValueError(f"count: expected 0 to {on.shape[0]}, the rows of stream, got {count}")
    if on.shape[0] == 0:
        return 0
    if on.device.type != "cpu":
        return count
    found = int(on.count_nonzero())
    if count is not None and count != found:
        raise ValueError(f"count: expected {found}, the rows that are on, got {count}")
    return found


def _check_rows(stream: Tensor) -> None:
    if not isinstance(stream, Tensor):
        raise TypeError(f"stream: expected a tensor, got {type(stream).__name__}")
    if stream.dim() < 1 or not stream.dtype.is_floating_point:
        raise ValueError(f"stream: expected a tensor of floats with at least one dimension, got {_kind(stream)}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@cache
def _native_devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if _library.build_info()["cuda"] else ("cpu",)
