"""What a judge of claims does with bytes: the interface, and Algorithm 1 behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mtlsign.claims.blob_store import MAX_HEAD, MAX_MODEL, MAX_REFERENCE, BlobStore
from mtlsign.claims.statements.types import Claim
from mtlsign.errors import ArtifactError, CarrierError, KeyMaterialError, MTLSignError

if TYPE_CHECKING:
    from mtlsign.watermark.verification.detector import Verdict


@dataclass(frozen=True, slots=True)
class Finding:
    """What one key says about one model. `status` is one of the votes (`statements.VOTES`)."""

    status: str
    matches: int = 0
    n: int = 0
    evidence_bits: float = 0.0
    reason: str = ""

    @property
    def accepted(self) -> bool:
        """The key is in the weights, by the verifier's policy."""
        return self.status == "accepted"

    @property
    def passes(self) -> bool:
        """The key is there by the numbers: accepted, or a trained head that fits (which fits anything)."""
        return self.status in ("accepted", "needs_commitment")


class ClaimVerifier(Protocol):
    """Decides whether a claim's key passes on a model. Never raises for what a stranger supplied."""

    def judge(self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int) -> Finding:
        """One finding; `reference`, `head` and `model` have been checked against the claim's digests."""


class DetectorClaimVerifier:
    """`verification.verify` on bytes from strangers: safetensors and allow-listed architectures only.

    Args:
        factories: architectures beyond the allow-list, from this operator's settings.
    """

    def __init__(self, factories: Mapping[str, object] | None = None) -> None:
        self.factories = factories

    def verdict(self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int) -> Verdict:
        """The whole verdict, with its numbers.

        Raises:
            ArtifactError, KeyMaterialError: what the claimant opened does not fit together.
            ModelError: the model or its architecture cannot be read.
        """
        from mtlsign.storage.safetensors_io import parse_safetensors
        from mtlsign.watermark.verification.detector import WatermarkDetector, verify
        from mtlsign.watermark.verification.reference import Reference

        detector = WatermarkDetector(
            claim.opening,
            Reference.from_bytes(reference),
            head=head,
            factories=self.factories,  # type: ignore[arg-type]  # load_factory gave them
        )
        tensors = parse_safetensors(model, max_bytes=MAX_MODEL)
        return verify(tensors, detector, bits=float(bits), model_digest=hashlib.sha256(model).hexdigest())

    def judge(  # noqa: D102
        self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int
    ) -> Finding:
        try:
            found = self.verdict(claim, reference, head, model, bits)
        except (ArtifactError, KeyMaterialError, CarrierError) as error:
            return Finding("inadmissible", reason=_short(error))
        except (
            MTLSignError, RuntimeError, ValueError, ArithmeticError, MemoryError, LookupError, TypeError,
        ) as error:  # fmt: skip
            return Finding("not_verifiable", reason=_short(error))  # a hostile file never stops a council
        return Finding(found.status, found.matches, found.n, found.evidence_bits, _short(found.reason or ""))


def fetch_and_verify(
    judge: ClaimVerifier, archive: BlobStore, claim: Claim, model: bytes, bits: int
) -> Finding:
    """Fetch what a claim names and judge its key on the model of digest `model`.

    What the claimant had to archive and did not, makes the claim inadmissible; a suspect that is gone or too
    large makes it not verifiable.
    """
    try:
        reference = archive.get(bytes.fromhex(claim.opening.parse().reference), MAX_REFERENCE)
        named = claim.heads[claim.key_index] if claim.key_index < len(claim.heads) else None
        head = None if named is None else archive.get(named, MAX_HEAD)
    except (ArtifactError, ValueError) as error:
        return Finding("inadmissible", reason=_short(error))
    try:
        data = archive.get(model, MAX_MODEL)
    except ArtifactError as error:
        return Finding("not_verifiable", reason=_short(error))
    return judge.judge(claim, reference, head, data, bits)


def _short(error: object) -> str:
    """A reason that fits a vote: printable, at most 128 characters."""
    text = " ".join(str(error).split())
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:128]
