"""What a cache tells without asking the device: how long it is (where it has that in a tensor we count), and where its
keys are."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from void_ext.patching import ledger


class CacheLengths:
    """Of each cache that counts on the device: its length, and the version of its content when it had that length."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, tuple[int, int | None]] = weakref.WeakKeyDictionary()

    def of(self, cache: Any) -> int:
        """Positions a cache holds. Shapes tell it where they can (and show that it was cropped); else our count."""
        if cache is None:
            return 0
        if isinstance(cache, (tuple, list)):
            return int(cache[0][0].shape[-2]) if cache and cache[0] is not None else 0
        known = None
        if type(cache) is not DynamicCache and weakly_referable(cache):
            known = self._known.get(cache)
        if known is not None:
            # A static cache answers with a device tensor: it is asked only if somebody (reset()) has written to it.
            length, version = known
            keys = _written_keys(cache)
            unseen = version is None and _on_the_host(keys)  # inference tensors do not tell of writes: asking is cheap
            if version == _content_version(keys) and not unseen:
                return length
        return int(cache.get_seq_length())

    def note(self, cache: Any, length: int) -> None:
        """A call left ``cache`` with that length."""
        # Of the cache that most calls have the answer is known; others are asked once, for they ask layer after layer.
        if type(cache) is not DynamicCache and (cache in self._known or getattr(cache, "is_compileable", False)):
            self._known[cache] = (length, _content_version(_written_keys(cache)))

    def forget(self, cache: Any) -> None:
        if cache is not None and weakly_referable(cache):
            self._known.pop(cache, None)

    def clear(self) -> None:
        self._known.clear()


def cache_of(output: Any) -> Any:
    """The cache that a body gave back."""
    if isinstance(output, dict):
        return ledger.cache_in(output)
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return None


def address_of(cache: Any) -> int | None:
    """Where the first keys of a cache begin. Cropping leaves them there, moving rows does not."""
    keys = _written_keys(cache)
    return None if keys is None or torch.compiler.is_compiling() else keys.data_ptr()


def weakly_referable(value: Any) -> bool:
    return not isinstance(value, (tuple, list)) and hasattr(type(value), "__weakref__")


def _on_the_host(keys: Tensor | None) -> bool:
    return keys is None or keys.device.type == "cpu"


def _written_keys(cache: Any) -> Tensor | None:
    """The keys of the first layer that is written to."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and not isinstance(layer, ledger.SkippedSlot):
            return keys
    return None


def _content_version(keys: Tensor | None) -> int | None:
    """A number that changes with every write to the keys of a cache; None where there is none."""
    return None if keys is None or keys.is_inference() else keys._version
