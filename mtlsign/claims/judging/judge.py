"""Verification of a claim's key on a model: interface, and implementation by Algorithm 1 of the paper."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mtlsign.claims.blob_store import MAX_HEAD, MAX_MODEL, MAX_REFERENCE, BlobStore
from mtlsign.claims.statements.types import Claim
from mtlsign.errors import ArtifactError, KeyMaterialError, MTLSignError

if TYPE_CHECKING:
    from mtlsign.watermark.keys.opening import KeyOpening
    from mtlsign.watermark.verification.detector import WatermarkDetector


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


#: Errors that untrusted parts can cause anywhere in the verification. They must not stop the council.
FAILURES = (
    MTLSignError, RuntimeError, ValueError, ArithmeticError, MemoryError, LookupError, TypeError,
    AttributeError, NotImplementedError, AssertionError, OSError,
)  # fmt: skip


#: Field of an error → cause for display.
_CAUSES = {
    "spec": "the spec cannot be evaluated, or exceeds the limits of docs/claims.md",
    "reference": "the reference is damaged, or does not fit the architecture",
    "head": "the trained head is damaged, or does not fit the architecture",
    "taps": "the architecture does not have the named taps",
    "model": "the file or its architecture cannot be read",
}


class DetectorClaimVerifier:
    """Algorithm 1 on untrusted bytes in this process: safetensors and allow-listed architectures only.

    Every failure before the model's tensors are read is a defect of the claim, which is then inadmissible.

    Args:
        factories: architectures beyond the allow-list, from the operator's settings.
        on_claim_accepted: called before the model is read, when the parts of the claim have been accepted.

    Attributes:
        verdicts: complete verdict on each verified model, by its SHA-256.
    """

    def __init__(
        self,
        factories: Mapping[str, object] | None = None,
        on_claim_accepted: Callable[[], None] = lambda: None,
    ) -> None:
        self.factories: Any = factories
        self._on_claim_accepted = on_claim_accepted
        self.verdicts: dict[str, dict[str, Any]] = {}

    def detector(self, opening: KeyOpening, reference: bytes, head: bytes | None) -> WatermarkDetector:
        """Return the detector of the parts that a claim opens.

        Args:
            opening: the opened key.
            reference: bytes of the reference.
            head: bytes of the trained head, or None.

        Raises:
            MTLSignError: the parts do not belong together, or the claim is too heavy.
        """
        from mtlsign.watermark.verification.compute_budget import check_claim_budget
        from mtlsign.watermark.verification.detector import WatermarkDetector
        from mtlsign.watermark.verification.reference import Reference

        check_claim_budget(opening.parse(), self.factories)
        return WatermarkDetector(
            opening, Reference.from_bytes(reference), head=head, factories=self.factories
        )

    def judge(  # noqa: D102
        self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int
    ) -> Finding:
        return self.judge_opening(claim.opening, reference, head, model, bits)

    def judge_opening(
        self, opening: KeyOpening, reference: bytes, head: bytes | None, model: bytes, bits: int
    ) -> Finding:
        """Return the finding of an opened key on a model; the arguments are those of `judge`.

        Args:
            opening: the key that the claim opens; nothing else of the claim is needed.
            reference: bytes of the reference.
            head: bytes of the trained head; None for a keyed head.
            model: safetensors bytes of the model.
            bits: required evidence in bits.
        """
        try:
            detector = self.detector(opening, reference, head)
        except FAILURES as error:
            return Finding("inadmissible", reason=_origin(error))
        self._on_claim_accepted()
        return self._judge_model(detector, model, bits)

    def _judge_model(self, detector: WatermarkDetector, model: bytes, bits: int) -> Finding:
        from mtlsign.storage.safetensors_io import parse_safetensors
        from mtlsign.watermark.verification.algorithm import verify

        digest = hashlib.sha256(model).hexdigest()
        try:
            tensors = parse_safetensors(model, max_bytes=MAX_MODEL)
            verdict = verify(tensors, detector, bits=float(bits), model_digest=digest)
        except FAILURES as error:
            return _unless_defective(detector, Finding("not_verifiable", reason=_origin(error)))
        self.verdicts[digest] = verdict.to_json()
        reason = _short(verdict.reason or "")
        finding = Finding(verdict.status, verdict.matches, verdict.n, verdict.evidence_bits, reason)
        return _unless_defective(detector, finding) if finding.status == "not_verifiable" else finding


def _unless_defective(detector: WatermarkDetector, finding: Finding) -> Finding:
    """Return a finding without verdict. If the claim fits no model at all, the claim is at fault."""
    defect = _defect_on_any_model(detector)
    return finding if defect is None else Finding("inadmissible", reason=defect)


def _defect_on_any_model(detector: WatermarkDetector) -> str | None:
    """Return the reason why the claimant's values allow no score even for random kernels, or None."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = {**detector.weight_shapes, **detector.optional_shapes}
    kernels = {name: torch.randn(shape, generator=generator).abs() + 0.1 for name, shape in shapes.items()}
    signs = {name: torch.randn(shape, generator=generator).sign() for name, shape in shapes.items()}
    tensors = {
        name: kernel * signs[name] if name in detector.weight_shapes else kernel
        for name, kernel in kernels.items()
    }
    try:
        result = detector.score_state_dict(tensors)
    except FAILURES as error:
        return _origin(error)
    return None if result.scores is not None else "the opened values give no finite score on any model"


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
    except (ArtifactError, KeyMaterialError) as error:
        return Finding("inadmissible", reason=_short(error.detail))
    try:
        data = archive.get(model, MAX_MODEL)
    except ArtifactError as error:
        return Finding("not_verifiable", reason=_short(error.detail))
    return judge.judge(claim, reference, head, data, bits)


def _origin(error: BaseException) -> str:
    """Return the cause of an error. Its own text may quote names from an untrusted file."""
    field = (error.field if isinstance(error, MTLSignError) else None) or "-"
    return _CAUSES.get(field) or _short(f"{type(error).__name__} in {field}")


def _short(error: object) -> str:
    """Return a reason that fits into a vote: printable ASCII, at most 128 characters."""
    text = " ".join(str(error).split())
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:128]
