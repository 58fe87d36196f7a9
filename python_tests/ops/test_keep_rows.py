from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from void_ext import ops, reference
from void_ext.testing import assert_bits_equal

KEEP = torch.ops.void_ext.keep_rows.default


def flags(rows: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return (torch.rand(rows, generator=torch.Generator().manual_seed(seed + rows)) < 0.5).to(device)


def test_matches_reference(device, dtype, layout, shape, random_rows) -> None:
    rows, _ = shape
    residual, update = layout(random_rows(*shape)), layout(random_rows(*shape, seed=1))
    for on in (flags(rows, device), torch.zeros(rows, dtype=torch.bool, device=device), flags(rows, device) | True):
        h = ops.keep_rows(residual, update, on)
        assert h.is_contiguous()
        assert_bits_equal(h, reference.keep_rows(residual, update, on), "h")
        assert_bits_equal(h[on], torch.add(residual, update)[on], "rows that are on, against torch.add")
        assert_bits_equal(h[~on], residual[~on], "rows that are off")


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_stands_in_a_row_that_is_off_has_no_effect(device, dtype, layout, random_rows, poison) -> None:
    residual, on = random_rows(9, 577), flags(9, device)
    clean = random_rows(9, 577, seed=1)
    dirty = clean.clone()
    dirty[~on] = poison
    assert bool(on.any())
    assert not bool(on.all())
    assert_bits_equal(ops.keep_rows(residual, layout(dirty), on), ops.keep_rows(residual, clean, on), "h")


def test_special_values(device, dtype, special_pairs) -> None:
    """All on: the sums of torch.add. All off: the bits of residual, NaN payloads, subnormals and signed zeros too."""
    residual, update = special_pairs
    on = torch.ones(len(residual), dtype=torch.bool, device=device)
    assert_bits_equal(ops.keep_rows(residual, update, on), residual + update, "all on", any_nan=True)
    assert_bits_equal(ops.keep_rows(residual, update, ~on), residual.contiguous(), "all off")


def test_rounds_as_torch_does_everywhere(device) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16).view(256, 256)
    on = torch.ones(256, dtype=torch.bool, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        residual = patterns.view(dtype)
        for other in (0.0, -1.0, 1e-3, 3.3e-5, 257.0, 1e-6):
            update = torch.full_like(residual, other)
            assert_bits_equal(ops.keep_rows(residual, update, on), residual + update, f"{dtype} {other}", any_nan=True)
        assert_bits_equal(ops.keep_rows(residual, update, ~on), residual, f"{dtype}, off")


def test_a_row_has_the_same_bits_alone(device, dtype, random_rows) -> None:
    residual, update, on = random_rows(33, 577), random_rows(33, 577, seed=1), flags(33, device)
    together = ops.keep_rows(residual, update, on)
    alone = [ops.keep_rows(residual[i : i + 1], update[i : i + 1], on[i : i + 1]) for i in range(33)]
    assert_bits_equal(torch.cat(alone), together)


def test_rows_past_the_caches(device, dtype, random_rows) -> None:
    """As large as the CPU kernel writes around its caches: 16 MiB."""
    residual, update = random_rows(1, 4096).expand(4097, 4096), random_rows(1, 4096, seed=1).expand(4097, 4096)
    on = flags(4097, device)
    assert_bits_equal(ops.keep_rows(residual, update, on), reference.keep_rows(residual, update, on))


def test_three_dimensions_and_one(device, dtype, random_rows) -> None:
    residual, update, on = random_rows(2, 3, 40), random_rows(2, 3, 40, seed=1), flags(6, device)
    h = ops.keep_rows(residual, update, on)
    assert h.shape == (2, 3, 40)
    assert_bits_equal(h.view(6, 40), ops.keep_rows(residual.view(6, 40), update.view(6, 40), on))
    one = torch.ones(1, dtype=torch.bool, device=device)
    assert_bits_equal(ops.keep_rows(residual[0, 0], update[0, 0], one), (residual + update)[0, 0])


def test_flags_at_any_stride(device, random_rows) -> None:
    residual, update = random_rows(6, 33), random_rows(6, 33, seed=1)
    table = flags(6 * 4, device).view(6, 4)
    for column in range(4):
        straight = table[:, column].contiguous()
        assert_bits_equal(ops.keep_rows(residual, update, table[:, column]), ops.keep_rows(residual, update, straight))
    everywhere = table[0, :1].expand(6)
    assert_bits_equal(
        ops.keep_rows(residual, update, everywhere), ops.keep_rows(residual, update, everywhere.contiguous())
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_random_shapes(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    residual, update, on = (
        torch.randn(rows, width).to(dtype),
        torch.randn(rows, width).to(dtype),
        torch.rand(rows) < 0.5,
    )
    assert_bits_equal(ops.keep_rows(residual, update, on), reference.keep_rows(residual, update, on))


def test_opcheck(device, dtype, random_rows) -> None:
    torch.library.opcheck(KEEP, (random_rows(3, 2, 33), random_rows(3, 2, 33, seed=1), flags(6, device)))


def test_compiles_without_breaks(device, random_rows) -> None:
    def layer(residual, update, on):
        return ops.keep_rows(residual, update * 2, on) + 1

    arguments = random_rows(6, 33), random_rows(6, 33, seed=1), flags(6, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*arguments)
    assert_bits_equal(compiled, layer(*arguments))


def test_gradient_of_the_rows_that_are_on(device, dtype, random_rows) -> None:
    residual, update = random_rows(3, 2, 33).requires_grad_(), random_rows(3, 2, 33, seed=1)
    on = flags(6, device)
    update.view(6, 33)[~on] = torch.nan  # never read: it must not come back as a gradient either
    update.requires_grad_()
    h = ops.keep_rows(residual, update, on)
    with torch.no_grad():
        assert_bits_equal(h.detach(), ops.keep_rows(residual, update, on))
    upstream = random_rows(3, 2, 33, seed=2)
    ours = torch.autograd.grad(h, (residual, update), upstream)
    assert_bits_equal(ours[0], upstream)
    assert torch.equal(ours[1], torch.where(on.view(3, 2, 1), upstream, 0))
    with pytest.raises(ValueError, match="update: expected shape"):
        ops.keep_rows(residual, update[:1], on)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": torch.ones(())}, "residual: expected at least one dimension, [..., D], got a tensor of none"),
        ({"residual": torch.ones(3, 8).double()}, "residual: expected float32, float16 or bfloat16, got float64"),
        ({"update": torch.ones(3, 7)}, "update: expected shape [3, 8] like residual, got [3, 7]"),
        ({"update": torch.ones(3, 8).half()}, "update: expected float32 like residual, got float16"),
        ({"on": torch.ones(3)}, "on: expected bool, got float32"),
        ({"on": torch.ones(3, 1, dtype=torch.bool)}, "on: expected one dimension, got shape [3, 1]"),
        (
            {"on": torch.ones(4, dtype=torch.bool)},
            "on: expected shape [3], a flag for each row of residual, got [4]",
        ),
    ],
)
def test_names_what_is_wrong(device, changes, message) -> None:
    rows, on = torch.ones(3, 8), torch.ones(3, dtype=torch.bool)
    arguments = {k: v.to(device) for k, v in {"residual": rows, "update": rows, "on": on, **changes}.items()}
    with pytest.raises(ValueError, match=re.escape(f"void_ext::keep_rows: {message}")):
        ops.keep_rows(**arguments)
