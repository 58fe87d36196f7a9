"""exit_select.cuh: active rows copied to the bit, all others left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from void_ext.testing import assert_bits_equal

ALPHA = 0.8


def run(shim, place, kept: Tensor, stream: Tensor, norms: Tensor, layer: int, layouts=("contiguous",) * 2) -> Tensor:
    count, width = kept.shape
    output = place.output(count, width, kept.dtype, layouts[0])
    output.view.copy_(kept)
    shim.exit_select(output.view, place.rows(stream, layouts[1]), place.rows(norms, "odd"), layer, ALPHA)
    output.check("kept")
    return output.view.clone()


def select(shim, kept: Tensor, stream: Tensor, norms: Tensor, layer: int) -> Tensor:
    executed = torch.ones(layer + 1, dtype=torch.bool)
    active = [bool(shim.rule(row[: layer + 2].contiguous(), executed, ALPHA)[layer]) for row in norms]
    return torch.where(torch.tensor(active, dtype=torch.bool)[:, None], stream, kept)


def table(count: int, layers: int) -> Tensor:
    return torch.rand(count, layers + 1, generator=torch.Generator().manual_seed(layers)).cumsum(dim=1)


def test_widths_and_layouts(shim, place, values, dtype, layout, width):
    count = 9
    kept, stream = values(count, width, dtype), values(count, width, dtype, seed=1)
    norms = table(count, 6)
    expected = select(shim, kept, stream, norms, layer=4)
    for layouts in ((layout, layout), (layout, "contiguous"), ("contiguous", layout)):
        assert_bits_equal(run(shim, place, kept, stream, norms, 4, layouts), expected, f"kept, stream: {layouts}")


@pytest.mark.parametrize("layer", [0, 1, 2, 9, 39])
@pytest.mark.parametrize("count", [0, 1, 33])
def test_layers(shim, place, values, dtype, layer, count):
    kept, stream = values(count, 72, dtype), values(count, 72, dtype, seed=1)
    norms = table(count, 40)
    expected = select(shim, kept, stream, norms, layer)
    assert_bits_equal(run(shim, place, kept, stream, norms, layer), expected, "kept")
    shim.configure(grid_limit=1, last_warp_first=True)
    assert_bits_equal(run(shim, place, kept, stream, norms, layer), expected, "kept, one block")


def test_both_verdicts_occur(shim):
    norms = table(33, 40)
    for layer in (9, 39):
        chosen = select(shim, torch.zeros(33, 1), torch.ones(33, 1), norms, layer)
        assert 0 < int(chosen.sum()) < 33


def test_nan_is_active_and_copied_as_it_is(shim, place, dtype):
    """Bits, not numbers: NaN payloads and signed zeros arrive unchanged, and 0 * inf has no part in it."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    stream = torch.arange(-512, 512, dtype=bits).view(dtype).reshape(2, -1)  # negative numbers are NaN with payloads
    kept = torch.full_like(stream, torch.inf)
    norms = torch.tensor([[1.0, torch.nan, 1.0], [3.0, 2.0, 1.0]])
    result = run(shim, place, kept, stream, norms, 1)
    assert_bits_equal(result, torch.stack([stream[0], kept[1]]), "kept")
