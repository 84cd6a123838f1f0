"""Chart of a verdict."""

from __future__ import annotations

from mtlsign.service.web.charts import null_distribution_svg, required_matches


def test_null_distribution_svg_shows_counts_without_inline_style() -> None:
    assert required_matches(1024, 120) == 712 and required_matches(600, 120) == 452
    assert required_matches(64, 120) is None
    for matches in (0, 512, 1024):
        svg = null_distribution_svg(matches, 1024, 712)
        assert (
            f"observed {matches:,}" in svg
            and "required 712" in svg
            and "style=" not in svg
            and "nan" not in svg
        )
