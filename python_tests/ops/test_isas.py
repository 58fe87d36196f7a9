"""Every instruction set's row kernels give the same bits, those of torch's roundings included."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from void_ext import _library

# Prints a digest of everything the row ops write, over widths that meet every loop and tail, every 16-bit pattern
# and special values; NaNs are made one pattern first, since payloads are no promise.
SCRIPT = """
import hashlib, torch
from void_ext import ops, _library
digest = hashlib.sha256()

def take(*tensors):
    for t in tensors:
        t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t).contiguous()
        digest.update(t.view(torch.int16 if t.element_size() == 2 else torch.int32).numpy().tobytes())

def feed(residual, update):
    rows, width = residual.shape
    weight = torch.linspace(-2, 2, width).to(residual.dtype)
    norms, updates = torch.zeros(rows, 4), torch.zeros(rows, 4)
    h = ops.add_l2norm(residual, update, norms, 1, updates)
    same = (h == residual + update) | (h.isnan() & (residual + update).isnan())
    assert same.all(), (residual.dtype, width)
    take(h, *ops.add_rms_norm(residual, update, weight, 1e-5, norms, 2, updates))
    ops.row_l2norm(residual, norms, 3)
    ops.streams_l2norm([residual], norms)
    assert torch.equal(norms[:, 0].view(torch.int32), norms[:, 3].view(torch.int32)), (residual.dtype, width)
    on = torch.arange(rows) % 3 != 1
    take(norms, updates, ops.keep_rows(residual, update, on))

torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for width in (1, 3, 15, 16, 17, 63, 64, 65, 127, 576, 577, 3584, 4095, 4096, 4097, 9001):
        feed(torch.randn(3, width).to(dtype), torch.randn(3, width).to(dtype))
        feed(torch.randn(3, width + 1).to(dtype)[:, 1:], torch.randn(3, width).to(dtype))
    large = torch.randn(2**24 // (4096 * dtype.itemsize) + 1, 4096).to(dtype)  # written around the caches
    feed(large, large.flip(0))
    inf = float("inf")
    values = torch.tensor([0.0, -0.0, 1.0, inf, -inf, inf - inf, 1e-45, 1e-40, 6e-8, 65504.0, 3e38])
    pairs = torch.cartesian_prod(values, values).to(dtype)
    feed(pairs[:, :1].repeat(1, 33), pairs[:, 1:].repeat(1, 33))
patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
for dtype in (torch.float16, torch.bfloat16):
    for other in (0.0, 1e-3, 3.3e-5, -257.0, 6e-8):
        feed(patterns.view(dtype), torch.full((256, 256), other, dtype=dtype))
print(_library.build_info()["cpu_isa"], digest.hexdigest())
"""


def run(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VOID_EXT_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=300)


def test_all_sets_agree_to_the_bit() -> None:
    digests = {}
    for isa in _library.build_info()["cpu_isas"]:
        result = run(isa)
        if result.returncode != 0 and "on this CPU" in result.stderr:
            continue
        assert result.returncode == 0, result.stderr
        name, digest = result.stdout.split()
        assert name == isa
        digests[isa] = digest
    assert "baseline" in digests
    assert len(set(digests.values())) == 1, digests


def test_the_best_supported_set_is_the_default() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "VOID_EXT_CPU_ISA"}
    code = "from void_ext import _library; print(_library.build_info()['cpu_isa'])"
    chosen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    usable = [isa for isa in _library.build_info()["cpu_isas"] if run_names(isa)]
    assert chosen.stdout.strip() == usable[-1]


def run_names(isa: str) -> bool:
    environment = {**os.environ, "VOID_EXT_CPU_ISA": isa}
    return (
        subprocess.run([sys.executable, "-c", "import void_ext.ops"], capture_output=True, env=environment).returncode
        == 0
    )


@pytest.mark.parametrize("wish", ["avx1024", "AVX2", "0"])
def test_an_unknown_set_is_refused(wish: str) -> None:
    result = run(wish)
    assert result.returncode != 0
    assert "LibraryError: VOID_EXT_CPU_ISA: expected one of baseline" in result.stderr
    assert f"got '{wish}'" in result.stderr
