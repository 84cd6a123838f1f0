"""Sentences of verdicts."""

from __future__ import annotations

from mtlsign.watermark.verification.verdict import Verdict


def test_summary_of_rejected_claim_states_evidence_and_not_absence() -> None:
    verdict = Verdict(
        "rejected", False, 96, 128, 0.75, 1e-8, 27.2, 120.0, 0.7, True, 1.0, 0, "count"
    )  # fmt: skip
    summary = verdict.summary()
    assert "96 of 128 bits agree" in summary and "2^-27.2" in summary and "2^-120 is required" in summary
    assert "does not show that the model is unmarked" in summary and "is not in" not in summary


def test_summary_of_unrelated_model_states_what_is_not_alike() -> None:
    verdict = Verdict(
        "unrelated", False, 60, 128, 0.47, 0.8, 0.3, 120.0, 0.7, False, 1.0, 0, "count", similarity=0.47
    )  # fmt: skip
    summary = verdict.summary()
    assert summary.startswith("Unrelated: 60 of 128 bits agree") and "base model" in summary
    assert verdict.to_json()["similarity"] == 0.47
