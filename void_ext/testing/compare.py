"""Comparisons that say where two tensors differ: what kind of difference, the coordinate, both values.

Order of ``assert_close``: shape, dtype, device; NaN masks; infinities with their signs; then the worst finite element.
So a NaN never passes as "close", and one wrong element is never averaged away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from void_ext.testing.tolerance import Tolerance

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bits_equal(actual: Tensor, expected: Tensor, name: str = "tensor", *, any_nan: bool = False) -> None:
    """Every bit of every element is the same; -0.0 differs from 0.0, a NaN equals only its own bit pattern.

    Args:
        actual, expected: same shape, dtype and device.
        name: what the message calls it.
        any_nan: let every NaN equal every NaN (adds may keep different payloads).
    Raises:
        AssertionError: names the number of differences and the first one's coordinate, values and bits.
    """
    _same_kind(actual, expected, name)
    bits = _BITS[actual.element_size()]
    left, right = actual.detach().contiguous().view(bits), expected.detach().contiguous().view(bits)
    different = left != right
    if any_nan and actual.dtype.is_floating_point:
        different &= ~(actual.isnan() & expected.isnan())
    if not different.any():
        return
    at = _first(different)
    digits = 2 * actual.element_size()
    mask = (1 << (4 * digits)) - 1
    raise AssertionError(
        f"{name}: {int(different.sum())} of {different.numel()} elements differ in their bits; the first at {at}: "
        f"{actual[at].item()!r} (0x{int(left[at]) & mask:0{digits}x}), "
        f"expected {expected[at].item()!r} (0x{int(right[at]) & mask:0{digits}x})"
    )


def assert_close(actual: Tensor, expected: Tensor, limit: Tolerance, name: str = "tensor") -> None:
    """``|actual - expected| <= atol + rtol * |expected|`` everywhere, in float64, with equal NaNs and infinities.

    ``expected`` may be of a wider float dtype than ``actual`` (a float64 reference); shape and device must agree.

    Raises:
        AssertionError: names the first NaN or infinity out of place, or the worst element (largest error over its
            limit), its coordinate, both values, the error, the limit and the tolerance's reason.
    """
    _same_kind(actual, expected, name, dtype=False)
    if not (actual.dtype.is_floating_point and expected.dtype.is_floating_point):
        raise AssertionError(f"{name}: expected float tensors, got {actual.dtype} and {expected.dtype}")
    got, want = actual.detach().double(), expected.detach().double()
    for kind, left, right in (
        ("NaN", got.isnan(), want.isnan()),
        ("+inf", got == torch.inf, want == torch.inf),
        ("-inf", got == -torch.inf, want == -torch.inf),
    ):
        if not torch.equal(left, right):
            at = _first(left != right)
            raise AssertionError(
                f"{name}: {kind} in {int(left.sum())} places, expected in {int(right.sum())}; first at {at}: "
                f"{actual[at].item()!r}, expected {expected[at].item()!r}"
            )
    finite = want.isfinite()
    error = torch.where(finite, (got - want).abs(), 0.0)
    allowed = torch.where(finite, limit.atol + limit.rtol * want.abs(), torch.inf)
    beyond = error > allowed
    if not beyond.any():
        return
    # An exact limit of 0 makes the ratio infinite for every wrong element; then the largest error is the worst.
    ratio = torch.where(beyond, error / allowed, -1.0)
    worst = torch.where(ratio == ratio.max(), error, -1.0)
    at = _unravel(int(worst.argmax()), worst.shape)
    raise AssertionError(
        f"{name}: {int(beyond.sum())} of {error.numel()} elements are off; the worst at {at}: {actual[at].item()!r}, "
        f"expected {expected[at].item()!r}, error {error[at].item():.3e}, limit {allowed[at].item():.3e} "
        f"(rtol {limit.rtol:.2e}, atol {limit.atol:.2e}: {limit.reason})"
    )


def assert_ulp_close(
    actual: Tensor, expected: Tensor, name: str = "tensor", *, max_ulp: int = 1, max_share: float = 1.0
) -> None:
    """No element is more than ``max_ulp`` representable values away, and at most ``max_share`` of them differ at all.

    For results that equal another rounding of the same value almost everywhere. NaN must meet NaN; -0.0 equals 0.0.

    Raises:
        AssertionError: names the worst element, its coordinate and distance, or the share of elements that differ.
    """
    _same_kind(actual, expected, name)
    if not actual.dtype.is_floating_point:
        raise AssertionError(f"{name}: expected a float tensor, got {actual.dtype}")
    nans = actual.isnan()
    if not torch.equal(nans, expected.isnan()):
        at = _first(nans != expected.isnan())
        raise AssertionError(
            f"{name}: NaN out of place at {at}: {actual[at].item()!r}, expected {expected[at].item()!r}"
        )
    distance = torch.where(nans, 0, (_ordinal(actual) - _ordinal(expected)).abs())
    if distance.numel() == 0:
        return
    at = _unravel(int(distance.argmax()), distance.shape)
    if int(distance[at]) > max_ulp:
        raise AssertionError(
            f"{name}: {int((distance > max_ulp).sum())} of {distance.numel()} elements are over {max_ulp} ulp off; "
            f"the worst at {at}: {actual[at].item()!r}, expected {expected[at].item()!r}, {int(distance[at])} ulp"
        )
    count = int((distance > 0).sum())
    if count > max_share * distance.numel():
        raise AssertionError(
            f"{name}: {count} of {distance.numel()} elements differ (share {count / distance.numel():.2e}, at most "
            f"{max_share:.2e} may); the first at {_first(distance > 0)}"
        )


def _ordinal(values: Tensor) -> Tensor:
    """int64 numbers in the order of the floats, neighbours one apart, both zeros at 0."""
    bits = values.detach().contiguous().view(_BITS[values.element_size()]).long()
    sign = 1 << (8 * values.element_size() - 1)
    return torch.where(bits >= 0, bits, -(bits + sign) if values.element_size() < 8 else -(bits & (sign - 1)))


def _same_kind(actual: Tensor, expected: Tensor, name: str, *, dtype: bool = True) -> None:
    for what, left, right in (
        ("shape", tuple(actual.shape), tuple(expected.shape)),
        ("dtype", actual.dtype, expected.dtype),
        ("device", actual.device, expected.device),
    ):
        if left != right and (dtype or what != "dtype"):
            raise AssertionError(f"{name}: {what} is {left}, expected {right}")


def _first(mask: Tensor) -> tuple[int, ...]:
    return _unravel(int(mask.flatten().int().argmax()), mask.shape)


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    at: list[int] = []
    for size in reversed(shape):
        at.append(index % size)
        index //= size
    return tuple(reversed(at))
