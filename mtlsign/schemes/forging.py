"""False claims that several schemes share: the best of many keys, and the time that a claim takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from mtlsign.schemes.base import Detection, Forgery


def best_of_keys(detect: Callable[[int], Detection], *, tries: int) -> Forgery:
    """Try keys one after the other, which is all that a hash or a signature permits.

    Args:
        detect: number of a key -> detection with it.
        tries: number of keys.

    Returns:
        The forgery with the most evidence. Tries cost log2(tries) bits of it.
    """
    started = time.monotonic()
    detections = [detect(index) for index in range(tries)]
    best = max(detections, key=lambda detection: detection.evidence_bits)
    return Forgery("best of random keys", tries, time.monotonic() - started, best)


def computed_key(method: str, detect: Callable[[], Detection]) -> Forgery:
    """Return the forgery with one key that is computed from the model.

    Args:
        method: how the key is made, in a few words.
        detect: makes the key and verifies with it.
    """
    started = time.monotonic()
    detection = detect()
    return Forgery(method, 1, time.monotonic() - started, detection)
