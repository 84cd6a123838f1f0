"""Tests of number formatting and confidence intervals."""

from __future__ import annotations

import math

import pytest

from mtlsign.reports import formatting
from mtlsign.reports.formatting import format_p


@pytest.mark.parametrize(
    ("bits", "text"),
    [(1024, "10^-308.3"), (4096.0, "10^-1233.0"), (120, "10^-36.1"), (1, "0.5"), (0, "1"), (-0.0, "1"),
     (None, "not available"), (math.inf, "not available"), (math.nan, "not available")],
)  # fmt: skip
def test_format_p_of_bits_is_a_power_of_ten(bits: float | None, text: str) -> None:
    assert format_p(bits) == text


def test_wilson_interval_matches_textbook_values() -> None:
    low, high = formatting.wilson(0.5, 100)
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)
    assert (formatting.wilson(0.0, 10)[0], formatting.wilson(1.0, 10)[1]) == pytest.approx((0.0, 1.0))


def test_further_scores_are_those_with_a_value_before_and_after() -> None:
    result = {
        "primary_clean": 0.5, "primary_marked": 0.5, "perplexity_clean": 94.81, "perplexity_marked": 81,
        "box_map50_clean": 0.25, "box_map50_marked": float("nan"), "wm_accuracy_on_clean": 0.5,
    }  # fmt: skip
    assert formatting.further_scores(result) == [("perplexity", "94.81 → 81")]
