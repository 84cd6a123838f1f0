"""Function behind `jobs/verify.py --bundle`: offline check of a bundle against a pinned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtlsign.claims.bundle import check_bundle
from mtlsign.claims.bundle_result import to_json
from mtlsign.claims.commands.settings import claim_verifier, write_card
from mtlsign.claims.judging.judge import Finding
from mtlsign.claims.model_card import claim_block
from mtlsign.config.claims import BundleSettings
from mtlsign.errors import ClaimError


def verify_bundle(settings: BundleSettings) -> dict[str, Any]:
    """Return the fields of the verdict on the accused model, with standing, sentence, votes and checkpoint.

    Raises:
        ClaimError: the bundle is damaged, or does not belong to the pinned checkpoint.
    """
    pinned = None
    if settings.head is not None:
        try:
            with open(settings.head, "rb") as file:
                pinned = file.read(64 * 1024 + 1)
        except OSError as error:
            raise ClaimError(f"{settings.head}: {error.strerror}. Pass a checkpoint.", field="head") from None
    with claim_verifier(settings.trusted_factory) as judge:
        checked = check_bundle(settings.bundle, judge, pinned=pinned, bits=settings.min_evidence_bits)
    finding = checked.dispute.matrix[checked.entry.leaf.hex()][checked.claim.suspect.hex()]
    bits = checked.dispute.standings[0].numbers["bits_required"]
    suspect = checked.claim.suspect.hex()
    verdict = judge.verdicts.get(suspect) or _unverified_verdict(finding, suspect, bits)
    result = verdict | to_json(checked)
    if settings.card is not None:
        write_card(settings.card, claim_block(result))
    if settings.report is not None:
        _write_report(settings.report, result)
    return result


def _write_report(path: Path, result: dict[str, Any]) -> None:
    from mtlsign.reports.claims import render_claim_report

    try:
        path.write_text(render_claim_report(result), "utf-8")
    except OSError as error:
        raise ClaimError(f"{path}: {error.strerror}. Pass another file.", field="report") from None


def _unverified_verdict(finding: Finding, suspect: str, bits: int) -> dict[str, Any]:
    """Return the verdict of a claim that was not verified: no evidence, with the reason."""
    from mtlsign.watermark.verification.verdict import Verdict

    verdict = Verdict(
        "not_verifiable", False, 0, 0, 0.0, 1.0, 0.0, float(bits), 0.7, False, 1.0, 0, "count",
        model_digest=suspect, reason=finding.reason,
    )  # fmt: skip
    return verdict.to_json()
