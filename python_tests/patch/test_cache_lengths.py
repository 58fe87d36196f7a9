"""A static cache has its length on the device: it is counted here, and asked where somebody else wrote to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

import void_ext
from void_ext.patching import lengths

IDS = torch.arange(3, 15).view(2, 6)


def positions(handle: void_ext.Handle) -> list[int]:
    trace = handle.trace
    assert trace is not None
    return trace.prompt.positions + trace.response.positions


class Output(dict[str, Any]):
    """As transformers 5.24 gives back, which warns of the name that caches had."""

    def get(self, key: str, default: Any = None) -> Any:
        assert key == "cache"
        return super().get(key, default)


def test_it_is_found_by_its_new_name_and_its_old() -> None:
    cache = object()
    assert lengths.cache_of(Output(cache=cache)) is cache
    assert lengths.cache_of(Output()) is None
    assert lengths.cache_of({"past_key_values": cache}) is cache


@torch.no_grad()
@pytest.mark.parametrize("inference", [False, True])
def test_it_is_not_asked_while_nobody_else_writes(inference: bool, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where asking would wait for it: the model asks as often as it does unpatched, and we never do."""
    asked: list[int] = []
    real = StaticCache.get_seq_length

    def get_seq_length(cache: StaticCache, *arguments: Any, **options: Any) -> Any:
        asked.append(1)
        return real(cache, *arguments, **options)

    monkeypatch.setattr(lengths, "_on_the_host", lambda keys: False)
    monkeypatch.setattr(StaticCache, "get_seq_length", get_seq_length)
    model = tiny("llama")

    def decode() -> int:
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.inference_mode(inference):
            model(IDS, past_key_values=cache)
            asked.clear()
            for _ in range(3):
                model(IDS[:, :1], past_key_values=cache)
        return len(asked)

    expected = decode()
    with void_ext.patch(model) as handle:
        assert decode() == expected
        assert positions(handle) == list(range(9))


@torch.no_grad()
@pytest.mark.parametrize("inference", [False, True])
def test_it_is_asked_after_a_reset(inference: bool, tiny: Any) -> None:
    model = tiny("llama")
    cache = StaticCache(config=model.config, max_cache_len=16)
    with void_ext.patch(model) as handle, torch.inference_mode(inference):
        model(IDS, past_key_values=cache)
        cache.reset()
        model(IDS[:, :4], past_key_values=cache)
        assert positions(handle) == [0, 1, 2, 3]
