"""Rows in every layout the ops accept, and norm tables with a sentinel where nothing may be written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

SENTINEL = -7.0


def _contiguous(values: Tensor) -> Tensor:
    return values.clone()


def _sliced(values: Tensor) -> Tensor:
    """Rows inside a wider tensor, off by one element: one row stride, no alignment."""
    wide = torch.full((*values.shape[:-1], values.shape[-1] + 5), 3.0, dtype=values.dtype, device=values.device)
    view = wide[..., 1 : 1 + values.shape[-1]]
    return view.copy_(values)


def _offset(values: Tensor) -> Tensor:
    """Contiguous from an odd storage offset on."""
    flat = torch.empty(values.numel() + 3, dtype=values.dtype, device=values.device)
    return flat[3:].view(values.shape).copy_(values)


def _transposed(values: Tensor) -> Tensor:
    """Elements of a row apart: no row stride at all, the op must copy."""
    return values.transpose(-1, -2).contiguous().transpose(-1, -2) if values.dim() > 1 else values.clone()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "sliced": _sliced,
    "offset": _offset,
    "transposed": _transposed,
}


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return LAYOUTS[request.param]


@pytest.fixture
def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    return LAYOUTS


@pytest.fixture(
    params=[(0, 5), (1, 1), (7, 3), (3, 64), (1, 576), (7, 577), (2, 3584), (7, 4096), (1, 4097), (3, 0)], ids=str
)
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture
def random_rows(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """random_rows(*shape, scale=1.0, seed=0): normally distributed rows, the same on every device."""

    def make(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return make


@pytest.fixture
def table(device: torch.device) -> Callable[..., Tensor]:
    """table(rows, columns): a strided, misaligned float32 table full of the sentinel."""

    def make(rows: int, columns: int) -> Tensor:
        return torch.full((rows, columns + 4), SENTINEL, device=device)[:, 3 : 3 + columns]

    return make


@pytest.fixture
def only_written() -> Callable[[Tensor, int, int], None]:
    """only_written(table, rows, column): everything but the first rows of one column is still the sentinel."""

    def check(table: Tensor, rows: int, column: int) -> None:
        untouched = table.clone()
        untouched[:rows, column] = SENTINEL
        assert torch.equal(untouched, torch.full_like(untouched, SENTINEL)), (
            f"written beside column {column}, rows < {rows}"
        )

    return check


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    float("inf"),
    float("-inf"),
    float("nan"),
    1e-45,
    6e-8,
    1e-40,
    -1e-40,
    6.1e-5,
    65504.0,
    3e38,
]


@pytest.fixture
def special_pairs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every pair of zeros, infinities, NaN, subnormals and the largest values, one a row; rows of width 33."""
    values = torch.tensor(SPECIAL, device=device).to(dtype)
    left, right = values.repeat_interleave(len(values)), values.repeat(len(values))
    return left[:, None].repeat(1, 33), right[:, None].repeat(1, 33)
