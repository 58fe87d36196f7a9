"""Caches without holes: which layers of a KV cache hold every position, kept in the cache itself.

A layer that was skipped holds fewer positions than the cache is long. Its slot in ``cache.layers`` becomes a
`SkippedSlot`, which answers for the length of the whole cache (transformers takes positions from layer 0 and masks from
the first layer of a kind) and knows how many positions it really holds. What would run such a layer is refused: before
any compute where the model is patched, and by the cache's own `CacheGuard` where it is not.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

#: Layer classes whose lengths we know how to answer for, by exact type.
_KNOWN_LAYERS = tuple(
    getattr(cache_utils, name)
    for name in ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer")
    if hasattr(cache_utils, name)
)

_CROPS_TO = "max_length" in inspect.signature(DynamicLayer.crop).parameters  # transformers 4.57


def cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among a forward's keyword arguments or outputs; transformers 5.24 renamed it. An empty one is false."""
    # Not by their own get(): outputs of transformers 5.24 warn of the old name there.
    cache = dict.get(arguments, "cache")
    return dict.get(arguments, "past_key_values") if cache is None else cache


class CacheHoleError(RuntimeError):
    """A call would run a layer that does not hold every position of the cache so far."""


class SkippedSlot(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Stands where a skipped layer's slot was, and keeps that.

    Attributes:
        inner: the layer's own slot, with the positions it got.
        peer: a slot of the same kind that holds everything, which is asked for lengths; None where there is none.
        held: positions in ``inner``.
        length: positions of the cache.
    """

    def __init__(self, inner: Any, held: int, length: int):
        # Not super().__init__(): keys and values are the inner slot's.
        self.inner = inner
        self.peer: Any = None
        self.held = held
        self.length = length

    def __repr__(self) -> str:
        return f"SkippedSlot({self.inner!r}, {self.held} of {self.length} positions)"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("inner", "peer"):  # not there yet while being copied
            raise AttributeError(name)
        try:
            return getattr(self.inner, name)
        except AttributeError:
            if self.peer is None:
                raise
            return getattr(self.peer, name)  # a slot that was never written to does not know its batch, say

    # What the base class defines would hide the inner slot's own.
    is_compileable = property(lambda self: self.inner.is_compileable)
    is_sliding = property(lambda self: self.inner.is_sliding)
    is_croppable = property(lambda self: getattr(self.inner, "is_croppable", True))
    is_initialized = property(lambda self: self.inner.is_initialized)
    keys = property(lambda self: self.inner.keys)
    values = property(lambda self: self.inner.values)

    @property
    def whole(self) -> bool:
        return self.held >= self.length

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.inner.lazy_initialization(*args, **kwargs)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise CacheHoleError(f"void_ext: this layer holds {self.held} of the {self.length} positions of its cache")

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        return self.length if self.peer is None else self.peer.get_seq_length(*args, **kwargs)

    def get_mask_sizes(self, query: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if self.peer is not None:
            return self.peer.get_mask_sizes(query, *args, **kwargs)
        if isinstance(self.inner, StaticLayer):
            return self.inner.get_mask_sizes(query, *args, **kwargs)
        new = query.shape[0] if isinstance(query, Tensor) else query  # transformers 4.57 hands over the positions
        return self.length + new, 0

    def get_max_length(self) -> Any:
        return self.inner.get_max_length()

    def get_max_cache_shape(self) -> Any:
        return self.inner.get_max_cache_shape()

    def crop(self, amount: int) -> None:
        """Negative: so many positions off the end; positive: down to so many. 0 is the latter in 4.57 alone."""
        if amount == 0 and not _CROPS_TO:
            return
        length = max(self.length + amount, 0) if amount < 0 else min(self.length, amount)
        if self.held > length:
            self.inner.crop(length - self.held)
            self.held = length
        self.length = length

    def reset(self) -> None:
        self.inner.reset()
        self.held = self.length = 0

    def offload(self) -> None:
        self.inner.offload()

    def prefetch(self) -> None:
        self.inner.prefetch()

    def reorder_cache(self, rows: Tensor) -> None:
        self.inner.reorder_cache(rows)


class CacheGuard:
    """Stands in for the ``update`` of a cache with holes, on that instance, whenever no patched call is writing to it.

    The first layer that runs asks it, so a dense model that is handed the cache is stopped before anything is written.
    """

    def __init__(self, cache: Any):
        self._cache = weakref.ref(cache)  # a cycle would keep the cache's memory until the garbage collector comes
        self.broken: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheGuard:
        copied = CacheGuard(memo[id(self._cache())])
        copied.broken = self.broken
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"broken": self.broken}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Which cache it is in is not known here: a patched call may go on with that, everybody else is refused.
        self.__dict__.update(state, _cache=lambda: None)

    def __call__(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        cache: Any = self._cache()
        self.check(cache)
        holes = _restore(cache)
        if holes:
            raise CacheHoleError(_hole_message(cache, holes))
        _unguard(cache)
        return type(cache).update(cache, key_states, value_states, layer_idx, *args, **kwargs)

    def check(self, cache: Any) -> None:
        if self.broken is not None:
            raise CacheHoleError(self.broken)
        if cache is None:
            raise CacheHoleError(
                "void_ext: this cache was filled while layers were skipped, and then saved; only a model patched with "
                "mode='skip' can go on with it"
            )


def check_kind(cache: Any) -> None:
    """Raises TypeError for a cache whose lengths we could not keep right; None is no cache."""
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise TypeError(
            f"past_key_values: expected a DynamicCache or a StaticCache with mode='skip', got {type(cache).__name__}"
        )
    if getattr(cache, "offloading", False):
        raise TypeError("past_key_values: an offloaded cache cannot be used with mode='skip'; use a plain one")
    for index, slot in enumerate(layers):
        if type(slot) is not SkippedSlot and type(slot) not in _KNOWN_LAYERS:
            raise TypeError(
                f"past_key_values: layer {index} is a {type(slot).__name__}; mode='skip' knows "
                f"{', '.join(kind.__name__ for kind in _KNOWN_LAYERS)}"
            )


def admit(cache: Any, needed: Iterable[int]) -> None:
    """A patched call is about to run, or project, the layers ``needed`` with ``cache``.

    Raises CacheHoleError, with nothing changed, where one of them does not hold every position so far.
    """
    check_kind(cache)
    guard = guard_of(cache)
    if guard is None:
        return
    guard.check(cache)
    holes = _restore(cache)
    wanted = [index for index in needed if index in holes]
    if wanted:
        raise CacheHoleError(_hole_message(cache, wanted))
    _unguard(cache)  # until close() or fail(): asking it for every layer would cost


def close(cache: Any, skipped: Sequence[int], start: int, length: int) -> None:
    """A patched call has written positions ``start`` to ``start + length`` to all layers but ``skipped``."""
    if cache is None:
        return
    slots = cache.layers
    changed = False
    for index in skipped:
        while len(slots) <= index:  # made as layers run: those at the end never did
            slots.append(cache.layer_class_to_replicate())
        slot = slots[index]
        if isinstance(slot, SkippedSlot):
            slot.length = start + length
        else:
            slots[index] = SkippedSlot(slot, start, start + length)
            changed = True
    if changed:
        _choose_peers(slots)
    if skipped or SkippedSlot in map(type, slots):
        _guard(cache)


def fail(cache: Any, start: int) -> None:
    """A patched call broke off: take back what it wrote, or mark the cache unusable where that cannot be done."""
    if cache is None:
        return
    if any(isinstance(slot, SkippedSlot) for slot in cache.layers):
        _guard(cache)
    slots: list[Any] = cache.layers
    for index, slot in enumerate(slots):
        if isinstance(slot, SkippedSlot) or not slot.is_initialized:
            continue
        keys, values = slot.keys, slot.values
        count = getattr(slot, "cumulative_length", None)
        if type(slot) is DynamicLayer:
            if start == 0:
                # As it was made, for a batch of another size may come next; reset() keeps the length before 5.18.
                slot.keys = slot.values = None
                slot.is_initialized = False
            elif slot.get_seq_length() > start:
                slot.crop(start - slot.get_seq_length())
        elif type(slot) is StaticLayer and (count is None or isinstance(count, Tensor)):
            # Inference tensors can be written to in their own mode alone.
            with torch.inference_mode(keys.is_inference()):
                if count is not None:
                    count.fill_(start)  # what was written behind it is never read
                else:
                    keys[:, :, start:].zero_()  # transformers 4.57 counts the positions that are not zero
                    values[:, :, start:].zero_()
        elif getattr(slot, "cumulative_length_int", count) != start:
            _guard(cache).broken = (
                f"void_ext: a forward failed while it wrote to this cache, and layer {index} "
                f"({type(slot).__name__}) cannot be taken back to the {start} positions before it; start with a new "
                "cache"
            )


def guard_of(cache: Any) -> CacheGuard | None:
    guard = getattr(cache, "__dict__", {}).get("update")
    return guard if isinstance(guard, CacheGuard) else None


def _restore(cache: Any) -> list[int]:
    """Put back the slots that are whole again (after a crop, a reset); the layers that are not."""
    holes = []
    for index, slot in enumerate(cache.layers):
        if isinstance(slot, SkippedSlot):
            if isinstance(slot.peer, DynamicLayer):
                # Ours is a count: a crop may have failed, a reset keeps the length before transformers 5.18.
                slot.length = slot.peer.get_seq_length()
            if slot.whole:
                cache.layers[index] = slot.inner
            else:
                holes.append(index)
    return holes


def _guard(cache: Any) -> CacheGuard:
    guard = guard_of(cache)
    if guard is None:
        guard = cache.__dict__["update"] = CacheGuard(cache)
    return guard


def _unguard(cache: Any) -> None:
    if guard_of(cache) is not None:
        del cache.__dict__["update"]


def _choose_peers(slots: list[Any]) -> None:
    for slot in slots:
        if isinstance(slot, SkippedSlot):
            slot.peer = next(
                (
                    other
                    for other in slots
                    if not isinstance(other, SkippedSlot) and other.is_sliding == slot.inner.is_sliding
                ),
                None,
            )


def _hole_message(cache: Any, holes: Sequence[int]) -> str:
    slot = cache.layers[holes[0]]
    listed = ", ".join(map(str, holes[:8])) + (", …" if len(holes) > 8 else "")
    return (
        f"void_ext: this cache was filled while layers were skipped ({listed}): layer {holes[0]} holds {slot.held} of "
        f"its {slot.length} positions, and running it would attend to a hole. Start with a new cache, or plan PROJECT "
        "for layers that are to run again"
    )
