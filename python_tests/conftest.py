"""What all tests share: the devices they run on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """cpu, and cuda where this machine and this build have it; `-m gpu` selects the latter alone."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        from void_ext import _library

        if not _library.build_info()["cuda"]:
            pytest.skip(f"built without CUDA: {_library.build_info()['cuda_reason']}")
    return torch.device(request.param)
