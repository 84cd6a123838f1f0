"""Least-recently-used cache."""

from __future__ import annotations

from mtlsign.service.verifier.lru_cache import LruCache


def test_lru_cache_over_limit_evicts_least_recently_used() -> None:
    cache: LruCache[str, int] = LruCache(lambda values: len(values) > 2)
    for name, value in (("a", 1), ("b", 2), ("c", 3)):
        cache.put(name, value)
    assert cache.get("a") == 1 and len(cache) == 3
    cache.evict()
    assert list(cache.values) == [3, 1] and cache.get("b") is None


def test_lru_cache_with_growing_values_applies_limit_to_current_sizes() -> None:
    cache: LruCache[str, list[int]] = LruCache(lambda values: sum(map(len, values)) > 3)
    first, second = [1], [2]
    cache.put("first", first)
    cache.put("second", second)
    cache.evict()
    assert len(cache) == 2
    second.extend([0] * 9)
    cache.evict()
    assert list(cache.values) == [second]  # the most recent value stays, although it exceeds the limit
