"""Least-recently-used cache whose limit is computed from its current values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Cache that evicts its least recently used values while `over_limit(values)` holds.

    The most recent value is never evicted, even if it exceeds the limit alone.

    Args:
        over_limit: predicate on the current values. The size of a value may change while it is cached.
    """

    def __init__(self, over_limit: Callable[[Collection[V]], bool]) -> None:
        self._over_limit = over_limit
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def values(self) -> Collection[V]:
        """Cached values, the least recently used first."""
        return self._entries.values()

    def get(self, key: K) -> V | None:
        """Return the value of `key` and make it the most recent; None if it is not cached."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: K, value: V) -> None:
        """Store a value as the most recent. Call `evict` afterwards to apply the limit."""
        self._entries[key] = value
        self._entries.move_to_end(key)

    def evict(self) -> None:
        """Evict values until the limit holds."""
        while len(self._entries) > 1 and self._over_limit(self.values):
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Evict everything."""
        self._entries.clear()
