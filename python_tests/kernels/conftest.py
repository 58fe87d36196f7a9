"""The CUDA kernels on the CPU (tools/hostshim.py), and rows laid out so that a kernel cannot stray unseen.

Inputs end where their memory ends (AddressSanitizer sees a read beyond) and are surrounded by NaN; outputs are poisoned
and surrounded by guards that must survive.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tools.hostshim import HostShim, build
from void_ext.testing import Tolerance

# Offset of the first row and gap between rows, in elements. 8 elements are 16 bytes or more.
LAYOUTS: dict[str, Callable[[int], tuple[int, int]]] = {
    "contiguous": lambda width: (0, width),
    "shifted": lambda width: (1, width),
    "padded": lambda width: (8, -(-width // 8) * 8 + 8),
    "gapped": lambda width: (0, width + 1),  # the first row on the grid, the next one off it
    "odd": lambda width: (3, width + 5),
}
SANITIZED = os.environ.get("VOID_EXT_HOSTSHIM_SANITIZE") == "1"
# The sanitizers ask where a kernel reads and writes, which fewer widths and layouts answer.
WIDTHS = [1, 8, 577] if SANITIZED else [1, 2, 3, 7, 8, 9, 31, 64, 65, 255, 257, 576, 577, 1023, 1032]
WIDE = [4097, 16384 + 8] if SANITIZED else [3584, 4096, 4097, 8192, 16384 + 8]
NORM = Tolerance(2e-6, 1e-30, "chains of at most 8 squares a pack, then a tree; squares below 1e-38 may vanish")
GUARD = 16
POISON = -0x5A5A

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="session")
def library() -> HostShim:
    return HostShim(build(sanitize=SANITIZED))


@pytest.fixture
def shim(library: HostShim) -> Iterator[HostShim]:
    yield library
    library.configure()


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["contiguous", "gapped", "odd"] if SANITIZED else list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass
class Output:
    """A poisoned tensor inside a larger one."""

    view: Tensor
    memory: Tensor
    inside: Tensor

    def check(self, name: str) -> None:
        """Nothing around the view was written, everything in it was (unless it still holds the poison by chance)."""
        poison = _poison(self.memory)
        assert bool((self.memory[~self.inside] == poison).all()), f"{name}: written outside"

    def untouched(self, name: str) -> None:
        assert bool((self.memory == _poison(self.memory)).all()), f"{name}: written, though nothing was to be"


def _poison(memory: Tensor) -> int:
    return -0x5A if memory.dtype == torch.int8 else POISON


class Place:
    """Makes inputs and outputs in the layouts above."""

    def rows(self, values: Tensor, layout: str = "contiguous") -> Tensor:
        count, width = values.shape
        offset, stride = LAYOUTS[layout](width)
        size = offset + (count - 1) * stride + width if count else offset
        bits = BITS[values.element_size()]
        memory = torch.full((size,), -1, dtype=bits).view(values.dtype)  # all ones is NaN in every format
        view = memory.as_strided((count, width), (stride, 1), offset)
        view.copy_(values)
        return view

    def output(self, count: int, width: int, dtype: torch.dtype, layout: str = "contiguous") -> Output:
        offset, stride = LAYOUTS[layout](width)
        offset += GUARD
        size = offset + count * stride + width + GUARD
        bits = BITS[torch.empty((), dtype=dtype).element_size()]
        memory = torch.empty(size, dtype=bits)
        memory.fill_(_poison(memory))
        inside = torch.zeros(size, dtype=torch.bool)
        inside.as_strided((count, width), (stride, 1), offset).fill_(True)
        return Output(memory.view(dtype).as_strided((count, width), (stride, 1), offset), memory, inside)

    def column(self, count: int, stride: int = 3) -> Output:
        """One column of a norm table."""
        size = GUARD + count * stride + GUARD
        memory = torch.full((size,), POISON, dtype=torch.int32)
        inside = torch.zeros(size, dtype=torch.bool)
        inside.as_strided((count,), (stride,), GUARD).fill_(True)
        return Output(memory.view(torch.float32).as_strided((count,), (stride,), GUARD), memory, inside)


@pytest.fixture(scope="session")
def place() -> Place:
    return Place()


def _values(count: int, width: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 7919 + width)
    return (torch.randn(count, width, generator=generator) * scale).to(dtype)


@pytest.fixture(scope="session")
def values() -> Callable[..., Tensor]:
    """Reproducible normal rows: values(count, width, dtype, seed=0, scale=1.0)."""
    return _values


@pytest.fixture(scope="session")
def norm_tolerance() -> Tolerance:
    return NORM


def _special_rows(dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    info = torch.finfo(dtype)
    step = info.smallest_normal * info.eps  # the smallest subnormal
    pairs = [
        (float("nan"), 1.0),
        (float("inf"), 1.0),
        (float("inf"), float("-inf")),
        (info.max, info.max),
        (-info.max, -info.max),
        (step, step),
        (-step, step),
        (info.smallest_normal, -step),
        (-0.0, -0.0),
        (1.0, info.eps / 2),  # a tie, to even
        (1.0 + info.eps, info.eps / 2),  # a tie, up
        (1.0, 0.75 * info.eps),
    ]
    residual, update = torch.zeros(len(pairs), width, dtype=dtype), torch.zeros(len(pairs), width, dtype=dtype)
    for row, (left, right) in enumerate(pairs):
        at = row * 5 % width
        residual[row, at], update[row, at] = left, right
    return residual, update


@pytest.fixture(scope="session")
def special_rows() -> Callable[[torch.dtype, int], tuple[Tensor, Tensor]]:
    """Residuals and updates with one remarkable pair a row, the rest zero: special_rows(dtype, width)."""
    return _special_rows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "width" in metafunc.fixturenames:
        metafunc.parametrize("width", WIDTHS + WIDE)
