"""How the tests of patched models run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from void_ext.patching import call


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by sharing work; on a busy machine they lose minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[True, False], ids=["deferred", "as-they-run"])
def both_ways_of_taking_norms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows on a CPU have their norms taken at the end of a call, many in each layer's add: models this small need
    the threshold moved to see the second way."""
    if not request.param:
        monkeypatch.setattr(call, "_DEFERRED_ELEMENTS", 0)
