"""Tests of the rows of an attack run."""

from __future__ import annotations

from typing import Any

from mtlsign.experiments.attack_runs.results import COLUMNS, TYPES, compare_with_baseline


def test_compare_with_baseline_applies_removal_rule() -> None:
    def removed(kind: str, verdict: str, bits: float, after: float) -> Any:
        row = dict.fromkeys(COLUMNS) | {
            "kind": kind, "verdict": verdict, "evidence_bits": bits, "primary_after": after,
        }  # fmt: skip
        return compare_with_baseline(row, baseline, 120.0)["removed"]

    baseline: dict[str, Any] = {"primary_after": 0.9, "evidence_bits": 500.0}
    assert removed("removal", "rejected", 119.9, 0.85) is True
    assert removed("removal", "rejected", 119.9, 0.849) is False  # over 5 points lost
    assert removed("removal", "accepted", 120.0, 0.9) is False
    assert removed("function_preserving", "needs_commitment", 40, 0.9) is True
    assert removed("function_preserving", "not_verifiable", 0, 0.9) is None
    assert removed("ambiguity", "rejected", 0, 0.9) is None
    baseline["evidence_bits"] = 119.0  # the model was not marked
    assert removed("removal", "rejected", 100.0, 0.9) is None


def test_types_cover_all_columns() -> None:
    assert tuple(TYPES) == COLUMNS
