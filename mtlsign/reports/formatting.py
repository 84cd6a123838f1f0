"""Formatting of untrusted values as numbers and text, and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def number(value: object) -> float | None:
    """Return a finite float, or None for anything else, booleans and numeric text included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def words(value: object, limit: int = 80) -> str:
    """Return the value as printable text of at most `limit` characters."""
    text = "".join(char if char.isprintable() else "�" for char in str(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def utc_time(seconds: int) -> str:
    """Return POSIX seconds as a date in UTC, in the form of ISO 8601: 2026-11-28T21:30:00Z."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s after 1970-01-01T00:00:00Z"


def wilson(rate: float, samples: int) -> tuple[float, float]:
    """Return the 95 % score interval (Wilson 1927) of a binomial rate over `samples` trials."""
    z = 1.959964
    centre = (rate + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z * math.sqrt(rate * (1 - rate) / samples + z * z / (4 * samples**2)) / (1 + z * z / samples)
    return max(0.0, centre - half), min(1.0, centre + half)


def format_p(bits: float | None) -> str:
    """Write the p-value 2^-bits as a power of ten, since a float could underflow: 1024 -> ``'10^-308.3'``.

    Args:
        bits: evidence in bits, that is -log2 of the exact one-sided tail probability.

    Returns:
        ``'10^-x.y'``; a plain decimal for less than ten bits; ``'not available'`` for None, NaN or infinity.
    """
    if bits is None or not math.isfinite(bits):
        return "not available"
    if bits < 10:
        return f"{2.0 ** -max(bits, 0.0):.3g}"
    return f"10^-{bits * math.log10(2):.1f}"


def further_scores(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of a task's further scores before and after embedding, such as the perplexity.

    Args:
        result: content of result.json, with `NAME_clean` and `NAME_marked` for each score.
    """
    rows = []
    for name in [str(key).removesuffix("_clean") for key in result if str(key).endswith("_clean")]:
        before, after = (number(result.get(f"{name}_{state}")) for state in ("clean", "marked"))
        if name not in ("primary", "validation") and before is not None and after is not None:
            rows.append((words(name.replace("_", " "), 40), f"{before:.4g} → {after:.4g}"))
    return rows
