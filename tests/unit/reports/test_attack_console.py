"""Tests of the terminal output of attack runs."""

from __future__ import annotations

from mtlsign.experiments.attack_runs.results import COLUMNS
from mtlsign.reports.attack_console import format_result


def test_rows_in_words() -> None:
    row = dict.fromkeys(COLUMNS) | {"attack": "x", "parameters": "a=1", "seconds": 1.0}
    assert format_result(row | {"status": "diverged", "reason": "NaN"}) == "x a=1 · diverged: NaN · 1.0 s"
    assert "not verifiable: gone" in format_result(
        row | {"status": "ok", "verdict": "not_verifiable", "reason": "gone", "points_lost": None}
    )
