"""mtlsign.reports.formatting."""

from __future__ import annotations

import math


def number(value: object) -> float | None:
    """A finite float, or None for anything else (booleans and numeric text are not numbers here)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def words(value: object, limit: int = 80) -> str:
    """Printable text of at most `limit` characters."""
    text = "".join(char if char.isprintable() else "�" for char in str(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def wilson(rate: float, samples: int) -> tuple[float, float]:
    """The 95 % score interval (Wilson 1927) of a binomial rate over `samples` trials."""
    z = 1.959964
    centre = (rate + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z * math.sqrt(rate * (1 - rate) / samples + z * z / (4 * samples**2)) / (1 + z * z / samples)
    return max(0.0, centre - half), min(1.0, centre + half)
