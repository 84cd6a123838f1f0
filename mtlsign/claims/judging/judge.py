"""Verification of a claim's key on a model: interface, and implementation by Algorithm 1 of the paper."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mtlsign.claims.blob_store import MAX_HEAD, MAX_MODEL, MAX_REFERENCE, BlobStore
from mtlsign.claims.statements.types import Claim
from mtlsign.errors import ArtifactError, CarrierError, KeyMaterialError, MTLSignError

if TYPE_CHECKING:
    from mtlsign.watermark.verification.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one key on one model. `status` is one of `statements.types.VOTES`."""

    status: str
    matches: int = 0
    n: int = 0
    evidence_bits: float = 0.0
    reason: str = ""

    @property
    def accepted(self) -> bool:
        """Return whether the key is in the weights by the verifier's policy."""
        return self.status == "accepted"

    @property
    def passes(self) -> bool:
        """Return whether the key is accepted, or a trained head matches (which it can on any model)."""
        return self.status in ("accepted", "needs_commitment")


class ClaimVerifier(Protocol):
    """Verifier of a claim's key on a model. It never raises because of untrusted input."""

    def judge(self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int) -> Finding:
        """Return the finding of a claim's key on a model.

        Args:
            claim: the claim.
            reference: bytes of the reference, whose digest was checked.
            head: bytes of the trained head, whose digest was checked; None for a keyed head.
            model: safetensors bytes of the model, whose digest was checked.
            bits: required evidence in bits.
        """


class DetectorClaimVerifier:
    """Algorithm 1 on untrusted bytes: safetensors and allow-listed architectures only.

    Args:
        factories: architectures beyond the allow-list, from the operator's settings.
    """

    def __init__(self, factories: Mapping[str, object] | None = None) -> None:
        self.factories = factories

    def verdict(self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int) -> Verdict:
        """Return the complete verdict; see `ClaimVerifier.judge` for the arguments.

        Args:
            claim: the claim.
            reference: bytes of the reference.
            head: bytes of the trained head, or None.
            model: safetensors bytes of the model.
            bits: required evidence in bits.

        Raises:
            ArtifactError, KeyMaterialError: the parts that the claim opens do not belong together.
            ModelError: the model or its architecture cannot be read.
        """
        from mtlsign.storage.safetensors_io import parse_safetensors
        from mtlsign.watermark.verification.detector import WatermarkDetector, verify
        from mtlsign.watermark.verification.reference import Reference

        detector = WatermarkDetector(
            claim.opening,
            Reference.from_bytes(reference),
            head=head,
            factories=self.factories,  # type: ignore[arg-type]  # from load_factory
        )
        tensors = parse_safetensors(model, max_bytes=MAX_MODEL)
        return verify(tensors, detector, bits=float(bits), model_digest=hashlib.sha256(model).hexdigest())

    def judge(  # noqa: D102
        self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int
    ) -> Finding:
        try:
            verdict = self.verdict(claim, reference, head, model, bits)
        except (ArtifactError, KeyMaterialError, CarrierError) as error:
            return Finding("inadmissible", reason=_short(error))
        except (
            MTLSignError, RuntimeError, ValueError, ArithmeticError, MemoryError, LookupError, TypeError,
        ) as error:  # fmt: skip
            # A malicious file must not stop the council.
            return Finding("not_verifiable", reason=_short(error))
        reason = _short(verdict.reason or "")
        return Finding(verdict.status, verdict.matches, verdict.n, verdict.evidence_bits, reason)


def fetch_and_verify(
    judge: ClaimVerifier, archive: BlobStore, claim: Claim, model: bytes, bits: int
) -> Finding:
    """Fetch the parts that a claim names and verify its key on a model.

    If the claimant did not archive reference or head, the claim is inadmissible. If the model is missing or
    too large, the result is not verifiable.

    Args:
        judge: verifies the key.
        archive: contains models and references by digest.
        claim: the claim.
        model: SHA-256 of the model.
        bits: required evidence in bits.
    """
    try:
        reference = archive.get(bytes.fromhex(claim.opening.parse().reference), MAX_REFERENCE)
        head_digest = claim.heads[claim.key_index] if claim.key_index < len(claim.heads) else None
        head = None if head_digest is None else archive.get(head_digest, MAX_HEAD)
    except (ArtifactError, ValueError) as error:
        return Finding("inadmissible", reason=_short(error))
    try:
        data = archive.get(model, MAX_MODEL)
    except ArtifactError as error:
        return Finding("not_verifiable", reason=_short(error))
    return judge.judge(claim, reference, head, data, bits)


def _short(error: object) -> str:
    """Return a reason that fits into a vote: printable ASCII, at most 128 characters."""
    text = " ".join(str(error).split())
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:128]
