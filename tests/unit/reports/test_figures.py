"""Tests of the figures in the embedding report."""

from __future__ import annotations

from mtlsign.reports import figures


def test_draw_scores_near_zero_count_as_wrong() -> None:
    drawn = figures.draw({}, {}, {"marked": [1.0, 5e-5, -1.0, 0.0]})
    assert "marked 1 of 4 agree" in drawn["scores"]


def test_draw_long_run_stays_small() -> None:
    rows = [{"step": s, "wm_loss": 1.0 + s % 7} for s in range(50_000)]
    assert len(figures.draw({}, {"phase2": rows}, {})["phase2_loss"]) < 200_000
