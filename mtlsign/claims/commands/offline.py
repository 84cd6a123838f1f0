"""`jobs/verify.py --bundle`: one file and a pinned head in, verdict and standing out, without any network."""

from __future__ import annotations

from typing import Any

from mtlsign.claims.bundle import check_bundle, to_json
from mtlsign.claims.commands.owner import factories_of, write_card
from mtlsign.claims.judging.judge import DetectorClaimVerifier, Finding
from mtlsign.claims.model_card import claim_block
from mtlsign.claims.statements.types import Claim
from mtlsign.config.claims import BundleSettings
from mtlsign.errors import ClaimError
from mtlsign.watermark.verification.detector import Verdict


class _VerdictCache(DetectorClaimVerifier):
    """Algorithm 1 that keeps the verdict on the accused model, so that it is computed once."""

    kept: Verdict | None = None

    def verdict(self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int) -> Verdict:
        found = super().verdict(claim, reference, head, model, bits)
        if found.model_digest == claim.suspect.hex():
            self.kept = found
        return found


def verify_bundle(settings: BundleSettings) -> dict[str, Any]:
    """The fields of a verdict on the accused model, and beside them standing, sentence, votes and head.

    Raises:
        ClaimError: the bundle is damaged, or is not of the pinned head.
    """
    pinned = None
    if settings.head is not None:
        try:
            with open(settings.head, "rb") as file:
                pinned = file.read(64 * 1024 + 1)
        except OSError as error:
            raise ClaimError(f"{settings.head}: {error.strerror}; give a head", field="head") from None
    judge = _VerdictCache(factories_of(settings.factory))
    checked = check_bundle(settings.bundle, judge, pinned=pinned, bits=settings.bits)
    found = checked.dispute.matrix[checked.entry.leaf.hex()][checked.claim.suspect.hex()]
    bits = checked.dispute.standings[0].numbers["bits_required"]
    verdict = judge.kept or _without_numbers(found, checked.claim, bits)
    done = verdict.to_json() | to_json(checked)
    if settings.card is not None:
        write_card(settings.card, claim_block(done))
    return done


def _without_numbers(found: Finding, claim: Claim, bits: int) -> Verdict:
    """What a claim that was never judged looks like as a verdict: no evidence, and why."""
    return Verdict(
        "not_verifiable", False, 0, 0, 0.0, 1.0, 0.0, float(bits), 0.7, False, 1.0, 0, "count",
        model_digest=claim.suspect.hex(), reason=found.reason,
    )  # fmt: skip
