"""Chart of a verdict: the number of matching bits against the distribution under the null hypothesis.

The SVG has no style attribute, because the content security policy of the page forbids inline styles.
"""

from __future__ import annotations

import math

from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 196, 16, 156


def null_distribution_svg(matches: int, n: int, required: int | None) -> Markup:
    """Draw Binomial(n, 1/2) as a curve, with lines for the required and the observed count.

    Args:
        matches: number of matching bits.
        n: number of bits of the key.
        required: smallest count that is accepted, or None if no count is.

    Returns:
        SVG whose label gives the same numbers as text; empty for n < 1.
    """
    if n < 1:
        return Markup("")
    middle, spread = n / 2, math.sqrt(n) / 2
    counts = [middle + spread * (i / 10 - 4.5) for i in range(91)]
    points = " ".join(
        f"{_x(c, n)},{round(BOTTOM - 96 * math.exp(-(((c - middle) / spread) ** 2) / 2), 1)}" for c in counts
    )
    label = (
        f"{matches:,} of {n:,} bits match. Without a watermark about {round(middle):,} ± "
        f"{max(1, round(3 * spread)):,} match."
    )
    x = _x(matches, n)
    return Markup(  # numbers only: no text of a client
        f'<svg class="null" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<polygon class="chance" points="{_x(counts[0], n)},{BOTTOM} {points} '
        f'{_x(counts[-1], n)},{BOTTOM}"/>'
        f'<line class="axis" x1="{LEFT}" y1="{BOTTOM}" x2="{WIDTH - LEFT}" y2="{BOTTOM}"/>'
        f"{_required_line(required, n)}"
        f'<line class="found" x1="{x}" y1="46" x2="{x}" y2="{BOTTOM}"/>'
        f'<circle class="dot" cx="{x}" cy="46" r="5"/>'
        f'<text x="{x}" y="36" text-anchor="{_anchor(matches, n)}">observed {matches:,}</text>{_ticks(n)}'
        f'<text class="small" x="{_x(middle, n)}" y="{HEIGHT - 4}" text-anchor="middle">matching bits; '
        f"the curve shows a model without the watermark</text></svg>"
    )


def _x(count: float, n: int) -> float:
    return round(LEFT + (WIDTH - 2 * LEFT) * count / n, 1)


def _required_line(required: int | None, n: int) -> str:
    if required is None or required > n:
        return ""
    x = _x(required, n)
    return (
        f'<line class="need" x1="{x}" y1="20" x2="{x}" y2="{BOTTOM}"/>'
        f'<text class="small" x="{x}" y="14" text-anchor="{_anchor(required, n)}">'
        f"required {required:,}</text>"
    )


def _ticks(n: int) -> str:
    return "".join(
        f'<text class="small" x="{_x(c, n)}" y="{BOTTOM + 18}" text-anchor="{anchor}">{c:,}</text>'
        for c, anchor in ((0, "start"), (n // 2, "middle"), (n, "end"))
    )


def _anchor(count: int, n: int) -> str:
    """Return the anchor of a label at that count, so that it stays inside the chart."""
    return "end" if count > 0.8 * n else "start" if count < 0.2 * n else "middle"


def required_matches(n: int, bits: float) -> int | None:
    """Return the smallest count with that many bits of evidence; None if even n of n has fewer."""
    from mtlsign.watermark.verification.evidence import binomial_evidence_bits

    if n < 1 or binomial_evidence_bits(n, n) < bits:
        return None
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if binomial_evidence_bits(middle, n) >= bits else (middle + 1, high)
    return low
