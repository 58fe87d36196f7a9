"""Calls every op with odd shapes and layouts, every dtype and kernel variant, and nothing else, for compute-sanitizer
(`compute-sanitizer --tool=memcheck --error-exitcode=77 python tools/gpu/drive_ops.py`).

No test framework and few torch kernels, because each runs many times slower there. Tensors get allocations of their own
(no caching allocator), so that an access past a tensor's end is one past its memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from void_ext import ops

# Warp rows, several warps, rows held in registers and rows that are not, a scalar tail, nothing at all.
SHAPES = [(0, 64), (3, 0), (1, 1), (7, 3), (5, 64), (9, 576), (7, 577), (2, 4096), (1, 16384 + 8), (1, 40_000)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYERS = 35


def layouts(values: Tensor) -> Iterator[Tensor]:
    """The rows contiguous, off the 16-byte grid, and with gaps; each ends where its memory ends."""
    rows, width = values.shape
    yield values.clone()
    for offset, gap in ((1, 0), (0, 8)):
        size = offset + max(rows - 1, 0) * (width + gap) + (width if rows else 0)
        memory = torch.zeros(size, dtype=values.dtype, device=values.device)
        yield memory.as_strided((rows, width), (width + gap, 1), offset).copy_(values)


def expect(what: str, right: bool) -> None:
    if not right:
        raise AssertionError(f"drive_ops: {what} is wrong")


def drive(device: torch.device) -> int:
    """Runs everything once, checks results coarsely, and returns the number of calls."""
    calls = 0
    for dtype in DTYPES:
        for rows, width in SHAPES:
            generator = torch.Generator().manual_seed(rows * 100_003 + width)
            residual, update = (torch.randn(rows, width, generator=generator).to(device, dtype) for _ in range(2))
            weight = torch.randn(width, generator=generator).to(device, dtype)
            expected = torch.add(residual, update)
            norms = torch.zeros(rows, LAYERS + 1, device=device)
            updates = torch.zeros(rows, LAYERS, device=device)
            history = torch.rand(rows, LAYERS + 1, generator=generator).cumsum(dim=1).to(device)
            where = f"{dtype} [{rows}, {width}]"
            for left, right in zip(layouts(residual), layouts(update), strict=True):
                for table in (None, updates):
                    h = ops.add_l2norm(left, right, norms, 2, table)
                    expect(f"add_l2norm {where}", torch.equal(h, expected))
                    h, normed = ops.add_rms_norm(left, right, weight, 1e-5, norms, 3, table)
                    expect(f"add_rms_norm {where}", torch.equal(h, expected) and bool(normed.isfinite().all()))
                    calls += 2 + drive_choice(left, right, weight, history, where)
                ops.row_l2norm(left, norms, 4)
                expect(f"norms {where}", torch.equal(norms[:, 2], norms[:, 3]))
                ops.streams_l2norm([h, left, expected], norms, 5)
                expect(f"norms of streams {where}", torch.equal(norms[:, 2:5:2], norms[:, 5:7]))
                expect(f"norms of streams {where}", torch.equal(norms[:, 7], norms[:, 5]))
                kept = right.clone()
                ops.exit_select(kept, left, history, LAYERS - 1, 0.8)
                chosen = (kept == left).all(dim=1) | (kept == right).all(dim=1)
                expect(f"exit_select {where}", bool(chosen.all()))
                calls += 3 + drive_dispatch(left, right, expected, where)
    for rows in (0, 1, 33, 257, 8193, 20_000):
        on = (torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < 0.5).to(device)
        index, inverse, count = ops.compact(on)
        expect(f"compact [{rows}]", int(count) == int(on.sum()) and torch.equal(index[inverse[on]], on.nonzero()[:, 0]))
        calls += 1
    for rows, layers in ((0, 4), (3, 0), (1, 1), (7, 32), (129, 33), (300, 70)):
        generator = torch.Generator().manual_seed(layers)
        history = torch.rand(rows, layers + 1, generator=generator).cumsum(dim=1).to(device)
        executed = (torch.rand(rows, layers, generator=generator) < 0.7).to(device)
        for ran in (None, executed):
            active = ops.void_mask(history, 0.8, ran)
            expect(f"void_mask [{rows}, {layers}]", ran is None or not bool((active & ~ran).any()))
            calls += 1
    return calls


def drive_choice(residual: Tensor, update: Tensor, weight: Tensor, history: Tensor, where: str) -> int:
    """Both adds for chosen rows, with a verdict and kept rows, into memory of the caller's; returns the calls."""
    rows = residual.shape[0]
    on = torch.arange(rows, device=residual.device) % 3 != 1
    norms, active = history.clone(), on.clone()
    kept, out, normed = (torch.zeros_like(residual) for _ in range(3))
    choice: dict[str, Any] = {"on": on, "alpha": 0.8, "active": active, "kept": kept}
    ops.add_l2norm(residual, update, norms, 3, out=out, **choice)
    again = norms.clone()
    ops.add_rms_norm(residual, update, weight, 1e-5, norms, 3, out=(out, normed), **choice)
    expect(f"chosen rows {where}", torch.equal(out[~on], residual[~on]) and torch.equal(norms, again))
    expect(f"kept rows {where}", torch.equal(kept[active], out[active]) and not bool(kept[~active].any()))
    return 2


def drive_dispatch(residual: Tensor, update: Tensor, added: Tensor, where: str) -> int:
    """A selection of rows dense and packed, which must agree; returns the number of calls."""
    rows, width = residual.shape
    on = torch.arange(rows, device=residual.device) % 3 != 1
    h = ops.keep_rows(residual, update, on)
    expect(f"keep_rows {where}", torch.equal(h[on], added[on]) and torch.equal(h[~on], residual[~on]))
    index, _, count = ops.compact(on)
    packed = ops.gather_rows(residual, index, count, rows)
    expect(f"gather_rows {where}", torch.equal(packed[: int(count)], residual[on]))
    memory = torch.zeros(rows, width + 3, dtype=residual.dtype, device=residual.device)
    for target in (memory[:, 1 : 1 + width], torch.zeros_like(h)):
        ops.scatter_rows(target, packed, index, count)
        expect(f"scatter_rows {where}", torch.equal(target[on], residual[on]) and not bool(target[~on].any()))
    return 5


def drive_large(device: torch.device) -> int:
    """The two adds on 16384 rows of 4096 in bfloat16, once each and in every variant that a model uses."""
    residual, update = (torch.randn(16384, 4096, device=device).bfloat16() for _ in range(2))
    norms, weight = torch.zeros(LAYERS + 1, 16384, device=device).t(), torch.rand(4096, device=device).bfloat16()
    for _ in range(3):
        ops.add_l2norm(residual, update, norms, 2)
        ops.add_rms_norm(residual, update, weight, 1e-5, norms, 3)
        ops.add_rms_norm(residual, update, weight, 1e-5, None)
    return 9


def main() -> None:
    parser = argparse.ArgumentParser(description="Call every op with odd shapes; for compute-sanitizer.")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--large", action="store_true", help="only the adds, at a size that is worth a profile")
    options = parser.parse_args()
    device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("drive_ops: --device: expected a device that torch sees, got cuda, and there is none")
    calls = drive_large(device) if options.large else drive(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"drive_ops: {calls} calls on {device}")


if __name__ == "__main__":
    main()
