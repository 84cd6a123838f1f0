"""The verdict as a picture: how many of N bits chance would agree on, and how many did.

Plain SVG without any style attribute, so that the page's content security policy can forbid inline styles.
"""

from __future__ import annotations

import math

from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 196, 16, 156


def null_distribution_svg(matches: int, n: int, required: int | None) -> Markup:
    """Binomial(N, ½) as a curve, the threshold and the found count as lines; text says the same."""
    if n < 1:
        return Markup("")
    span = WIDTH - 2 * LEFT

    def x(count: float) -> float:
        return round(LEFT + span * count / n, 1)

    middle, spread = n / 2, math.sqrt(n) / 2
    steps = [middle + spread * (i / 10 - 4.5) for i in range(91)]
    points = " ".join(
        f"{x(c)},{round(BOTTOM - 96 * math.exp(-(((c - middle) / spread) ** 2) / 2), 1)}" for c in steps
    )
    need = ""
    if required is not None and required <= n:
        at, side = x(required), _side(required, n)
        need = (
            f'<line class="need" x1="{at}" y1="20" x2="{at}" y2="{BOTTOM}"/>'
            f'<text class="small" x="{at}" y="14" text-anchor="{side}">needed {required:,}</text>'
        )
    at, side = x(matches), _side(matches, n)
    told = (
        f"{matches:,} of {n:,} bits agree. Without a mark about {round(middle):,} would, give or take "
        f"{max(1, round(3 * spread)):,}."
    )
    ticks = "".join(
        f'<text class="small" x="{x(c)}" y="{BOTTOM + 18}" text-anchor="{a}">{c:,}</text>'
        for c, a in ((0, "start"), (n // 2, "middle"), (n, "end"))
    )
    return Markup(  # numbers only: nothing in it comes from a stranger
        f'<svg class="null" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">'
        f'<polygon class="chance" points="{x(steps[0])},{BOTTOM} {points} {x(steps[-1])},{BOTTOM}"/>'
        f'<line class="axis" x1="{LEFT}" y1="{BOTTOM}" x2="{WIDTH - LEFT}" y2="{BOTTOM}"/>{need}'
        f'<line class="found" x1="{at}" y1="46" x2="{at}" y2="{BOTTOM}"/>'
        f'<circle class="dot" cx="{at}" cy="46" r="5"/>'
        f'<text x="{at}" y="36" text-anchor="{side}">found {matches:,}</text>{ticks}'
        f'<text class="small" x="{x(middle)}" y="{HEIGHT - 4}" text-anchor="middle">bits that agree; '
        f"the hill is chance</text></svg>"
    )


def _side(count: int, n: int) -> str:
    """Where a label of that count begins, so that it stays inside the picture."""
    return "end" if count > 0.8 * n else "start" if count < 0.2 * n else "middle"


def matches_needed(n: int, bits: float) -> int | None:
    """The least count whose exact tail has that many bits; None when even N of N has not."""
    from mtlsign.watermark.verification.evidence import binomial_evidence_bits

    if n < 1 or binomial_evidence_bits(n, n) < bits:
        return None
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if binomial_evidence_bits(middle, n) >= bits else (middle + 1, high)
    return low
