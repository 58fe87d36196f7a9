"""The order of an item's options, from a hash of the item: the same on every machine, in every file and subset."""

from __future__ import annotations

import hashlib
import itertools


def hashed_order(key: str, count: int) -> tuple[int, ...]:
    """A permutation of ``range(count)``: number SHA-256(key) mod count! of all in lexicographic order.

    Every permutation is equally likely over the keys (to 1 in 10⁷⁰), so the right answer falls on each position for
    1/count of many items, and what an item's order is hangs neither on its neighbours nor on a seed.
    """
    orders = list(itertools.permutations(range(count)))
    return orders[int.from_bytes(hashlib.sha256(key.encode()).digest(), "big") % len(orders)]
