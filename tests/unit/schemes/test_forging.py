from __future__ import annotations

from mtlsign.schemes.detection import detection_of
from mtlsign.schemes.forging import best_of_keys, computed_key


def test_best_of_keys_returns_most_evidence() -> None:
    forgery = best_of_keys(lambda index: detection_of(50 + index, 100, 0.5, 40.0), tries=5)
    assert (forgery.tries, forgery.detection.matched, forgery.method) == (5, 54, "best of random keys")
    assert forgery.seconds >= 0


def test_computed_key_is_one_try() -> None:
    forgery = computed_key("columns negated", lambda: detection_of(100, 100, 0.5, 40.0))
    assert (forgery.tries, forgery.detection.accepted, forgery.method) == (1, True, "columns negated")
