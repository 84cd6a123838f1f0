"""Tests of the rendering of pages: powers of two, and colours that can be read in light and dark."""

from __future__ import annotations

import re

import pytest

from mtlsign.service.web.rendering import _format_powers, _static_file


def test_format_powers_writes_exponents_and_escapes_text() -> None:
    text = _format_powers("a <b> probability of 2^-128.0, and 2^-120 is required")
    assert text == "a &lt;b&gt; probability of 2<sup>−128.0</sup>, and 2<sup>−120</sup> is required"


def colours(scheme: str) -> dict[str, str]:
    """Return the colours of a scheme by variable, as six hexadecimal digits."""
    blocks = re.findall(r":root \{([^}]*)\}", _static_file("style.css").decode())
    variables = dict(re.findall(r"--([\w-]+): #(\w+);", blocks[0]))
    if scheme == "dark":
        variables |= dict(re.findall(r"--([\w-]+): #(\w+);", blocks[1]))
    return {
        name: value if len(value) == 6 else "".join(2 * c for c in value) for name, value in variables.items()
    }


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_of_pages_has_contrast_of_wcag_in_both_schemes(scheme: str) -> None:
    colour = colours(scheme)
    pairs = [(text, ground) for text in ("ink", "soft", "blue", "bad") for ground in ("paper", "card")]
    pairs += [("on-color", ground) for ground in ("blue", "good", "bad", "open")]
    for text, ground in pairs:
        light, dark = sorted((luminance(colour[text]), luminance(colour[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
