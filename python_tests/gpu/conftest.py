"""One call of every op with its inputs and everything it writes, for what only a GPU can show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from void_ext import ops

OPS = [
    *("add_l2norm", "add_rms_norm", "row_l2norm", "streams_l2norm", "void_mask", "exit_select"),
    *("keep_rows", "compact", "gather_rows", "scatter_rows"),
]
LAYERS = 12
SENTINEL = -7.0


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """The current CUDA device; skips where there is none or the build has no CUDA."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from void_ext import _library

    if not _library.build_info()["cuda"]:
        pytest.skip(f"built without CUDA: {_library.build_info()['cuda_reason']}")
    _library.load()
    return torch.device("cuda", torch.cuda.current_device())


@dataclass
class Call:
    """An op on fixed tensors: `inputs` may be refilled, `written` is what it mutates, `run` returns that and more."""

    inputs: list[Tensor]
    written: list[Tensor]
    run: Callable[[], tuple[Tensor, ...]]

    def reset(self) -> None:
        for tensor in self.written:
            tensor.fill_(SENTINEL)

    def fill(self, seed: int) -> None:
        """New inputs, the same for every device."""
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.inputs:
            if tensor.dtype == torch.bool:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) < 0.8)
            elif tensor.dtype == torch.int64 and tensor is self.inputs[-1]:  # a count of the first input's rows
                tensor.copy_(torch.randint(self.inputs[0].shape[0] + 1, (1,), generator=generator))
            elif tensor.dtype == torch.int64:  # an index of them
                tensor.copy_(torch.randperm(tensor.shape[0], generator=generator))
            elif tensor.dim() == 2 and tensor.shape[1] == LAYERS + 1:  # a norm table: sums of positive steps
                tensor.copy_(torch.rand(tensor.shape, generator=generator).cumsum(dim=1))
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def results(self) -> list[Tensor]:
        """Copies of everything the op returned or wrote, from a fresh state."""
        self.reset()
        return [tensor.clone() for tensor in self.run()]


def _make_call(
    op: str, device: torch.device, rows: int = 33, width: int = 577, dtype: torch.dtype = torch.bfloat16
) -> Call:
    def stream() -> Tensor:
        return torch.zeros(rows, width, dtype=dtype, device=device)

    norms = torch.full((rows, LAYERS + 1), SENTINEL, device=device)
    if op in ("add_l2norm", "add_rms_norm"):
        residual, update = stream(), stream()
        updates = torch.full((rows, LAYERS), SENTINEL, device=device)
        if op == "add_l2norm":
            return Call(
                [residual, update],
                [norms, updates],
                lambda: (ops.add_l2norm(residual, update, norms, 3, updates), norms, updates),
            )
        weight = torch.zeros(width, dtype=dtype, device=device)
        return Call(
            [residual, update, weight],
            [norms, updates],
            lambda: (*ops.add_rms_norm(residual, update, weight, 1e-5, norms, 3, updates), norms, updates),
        )
    if op == "row_l2norm":
        rows_in = stream()

        def run_row() -> tuple[Tensor, ...]:
            ops.row_l2norm(rows_in, norms, 3)
            return (norms,)

        return Call([rows_in], [norms], run_row)
    if op == "streams_l2norm":
        streams = [stream() for _ in range(5)]

        def run_streams() -> tuple[Tensor, ...]:
            ops.streams_l2norm(streams, norms, 3)
            return (norms,)

        return Call(streams, [norms], run_streams)
    if op == "void_mask":
        executed = torch.ones(rows, LAYERS, dtype=torch.bool, device=device)
        return Call([norms, executed], [], lambda: (ops.void_mask(norms, 0.8, executed),))
    if op in ("keep_rows", "compact"):
        residual, update = stream(), stream()
        on = torch.ones(rows, dtype=torch.bool, device=device)
        if op == "compact":
            return Call([on], [], lambda: ops.compact(on))
        return Call([residual, update, on], [], lambda: (ops.keep_rows(residual, update, on),))
    if op in ("gather_rows", "scatter_rows"):
        rows_in, target = stream(), stream()
        index = torch.zeros(rows, dtype=torch.int64, device=device)
        count = torch.zeros(1, dtype=torch.int64, device=device)
        places = torch.arange(rows, device=device)[:, None]

        def run_gather() -> tuple[Tensor, ...]:
            packed = ops.gather_rows(rows_in, index, count, rows)
            return (torch.where(places < count, packed, 0.0),)  # what lies behind the count may be anything

        def run_scatter() -> tuple[Tensor, ...]:
            ops.scatter_rows(target, rows_in, index, count)
            return (target,)

        if op == "gather_rows":
            return Call([rows_in, index, count], [], run_gather)
        return Call([rows_in, index, count], [target], run_scatter)
    rows_in, kept = stream(), stream()

    def run_exit() -> tuple[Tensor, ...]:
        ops.exit_select(kept, rows_in, norms, 7, 0.8)
        return (kept,)

    return Call([rows_in, norms], [kept], run_exit)


@pytest.fixture(scope="session")
def make_call() -> Callable[..., Call]:
    """make_call(op, device, rows=33, width=577, dtype=bfloat16): inputs still to be filled."""
    return _make_call


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
