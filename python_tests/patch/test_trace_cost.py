"""What tracing keeps, and that it waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import void_ext

pytestmark = pytest.mark.usefixtures("ways_of_taking_norms")


@torch.no_grad()
def test_buffers_grow_by_doubling_and_can_be_released(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1]
    with void_ext.patch(model) as handle:
        cache = model(input_ids=ids, use_cache=True).past_key_values
        capacities = set()
        for _ in range(120):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            capacities.add(handle._recorder.store.capacity)
        assert capacities == {64, 128, 256}
        trace = handle.trace
        handle.release()
        assert handle.trace is None
        assert trace is not None
        assert trace.response.norms.shape == (1, 120, 7)
        model(input_ids=ids)
        assert handle.trace is not None


class CountSyncs(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in func.name() for name in self.WAITS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
@pytest.mark.parametrize("mode", ["trace", "exit"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_no_host_synchronisation_is_added(
    cache: str | None, mode: str, granularity: str, tiny: Any, padded_batch: Any
) -> None:
    model = tiny("llama")
    ids, mask = padded_batch

    def run() -> int:
        with CountSyncs() as counter:
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                cache_implementation=cache,
            )
        return counter.count

    run()  # transformers 4.57 keeps a static cache on the model and finds it filled in the second run
    before = run()
    with void_ext.patch(model, mode=mode, granularity=granularity, updates=True, halves=True) as handle:
        assert run() == before
        assert handle.trace is not None
