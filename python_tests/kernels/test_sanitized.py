"""The tests of this folder once more, the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

The sanitizers must be in the process from its start, so it is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.hostshim import ROOT, compiler

SANITIZED = "VOID_EXT_HOSTSHIM_SANITIZE"

if os.environ.get(SANITIZED) == "1":
    pytest.skip("these are the sanitized tests", allow_module_level=True)

OVERRUN = """
import torch
from tools.hostshim import HostShim, build
class Claim:
    # A tensor that says it is wider than its memory.
    def __init__(self, rows, width):
        self.shape, self.dtype, self.data_ptr, self.stride = (1, width), rows.dtype, rows.data_ptr, lambda axis: width
shim, rows = HostShim(build(sanitize=True)), torch.ones({size}, dtype=torch.bfloat16)
shim.row_l2norm(Claim(rows, {claimed}), torch.zeros(1))
print("unnoticed")
"""


def environment() -> dict[str, str]:
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):  # the last: shim exceptions pass through its symbols
        found = subprocess.run([*compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        path = Path(found.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"{compiler()[0]} has no {name}")
        libraries.append(str(path))
    # Python and torch leak by design. Their own undefined behaviour is not compiled with UBSan, so it does not report.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", SANITIZED: "1"}
    return {**os.environ, **options, "LD_PRELOAD": ":".join(libraries), "PYTHONPATH": str(ROOT)}


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=540
    )


def test_the_suite_under_sanitizers():
    result = run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).parent)])
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-6000:]}"


@pytest.mark.parametrize(("size", "claimed"), [(577, 578), (576, 584)], ids=["one element", "one pack"])
def test_an_overrun_is_reported(size, claimed):
    """What the test above relies on: a read of one element, or one pack, behind a row's memory stops the process."""
    result = run(["-c", OVERRUN.format(size=size, claimed=claimed)])
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "unnoticed" not in result.stdout
