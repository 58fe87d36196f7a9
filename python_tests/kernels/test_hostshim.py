"""The host shim itself: kernels that are wrong on purpose must be noticed."""

from __future__ import annotations

import math

import pytest

FAULTS = {
    "a thread returns before the barrier": (
        0,
        r"thread \(63, 0\) of block 0 waits at __syncthreads, but thread \(5, 0\)",
    ),
    "a warp skips the barrier": (1, r"waits at __syncthreads, but thread \(63, 0\) of block 0 has returned"),
    "a lane returns before the shuffle": (2, r"waits at a shuffle in vain"),
    "a shuffle from no lane": (3, r"for lane 32, outside its mask"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_divergence_is_reported(shim, what):
    fault, message = FAULTS[what]
    for last_warp_first in (False, True):
        shim.configure(last_warp_first=last_warp_first)
        with pytest.raises(RuntimeError, match=message if not last_warp_first else "waits at"):
            shim.faulty(fault)
    assert shim.faulty(99) == 0.0  # and the next launch is sound


def test_shared_memory_starts_as_nan(shim):
    assert math.isnan(shim.faulty(4))


def test_a_missing_barrier_shows_in_one_of_the_orders(shim):
    first = shim.faulty(5)
    shim.configure(last_warp_first=True)
    assert (math.isnan(first), shim.faulty(5)) == (True, 1.0)
