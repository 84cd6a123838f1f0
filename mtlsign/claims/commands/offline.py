"""Function behind `jobs/verify.py --bundle`: offline check of a bundle against a pinned checkpoint."""

from __future__ import annotations

from typing import Any

from mtlsign.claims.bundle import check_bundle, to_json
from mtlsign.claims.commands.settings import trusted_factories, write_card
from mtlsign.claims.judging.judge import DetectorClaimVerifier, Finding
from mtlsign.claims.model_card import claim_block
from mtlsign.claims.statements.types import Claim
from mtlsign.config.claims import BundleSettings
from mtlsign.errors import ClaimError
from mtlsign.watermark.verification.verdict import Verdict


class _VerdictCache(DetectorClaimVerifier):
    """Verifier that stores the verdict on the accused model, so that it is computed only once."""

    suspect_verdict: Verdict | None = None

    def verdict(self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int) -> Verdict:
        verdict = super().verdict(claim, reference, head, model, bits)
        if verdict.model_digest == claim.suspect.hex():
            self.suspect_verdict = verdict
        return verdict


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
    judge = _VerdictCache(trusted_factories(settings.trusted_factory))
    checked = check_bundle(settings.bundle, judge, pinned=pinned, bits=settings.min_evidence_bits)
    finding = checked.dispute.matrix[checked.entry.leaf.hex()][checked.claim.suspect.hex()]
    bits = checked.dispute.standings[0].numbers["bits_required"]
    verdict = judge.suspect_verdict or _unverified_verdict(finding, checked.claim, bits)
    result = verdict.to_json() | to_json(checked)
    if settings.card is not None:
        write_card(settings.card, claim_block(result))
    return result


def _unverified_verdict(finding: Finding, claim: Claim, bits: int) -> Verdict:
    """Return the verdict of a claim that was not verified: no evidence, with the reason."""
    return Verdict(
        "not_verifiable", False, 0, 0, 0.0, 1.0, 0.0, float(bits), 0.7, False, 1.0, 0, "count",
        model_digest=claim.suspect.hex(), reason=finding.reason,
    )  # fmt: skip
