"""Tracing: which recipients' copies a suspect was made from.

Each recipient got a copy of one W0 that is marked with another key. The suspect is read with every key. For a
key that had no part in the suspect, the number of matching bits is exactly Binomial(N, ½); with R keys the
chance that any innocent one reaches the threshold is at most R times the tail, so that log2 R bits are
subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mtlsign.config.trace import TraceSettings
from mtlsign.storage.model_folder import read_model
from mtlsign.watermark.kit import OwnerKit, detector_for_kit, open_kit
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.verdict import Verdict


@dataclass(frozen=True)
class TracedRecipient:
    """Result for one recipient.

    Attributes:
        kit: location of the kit.
        recipient: name in the kit; None if it has none.
        verdict: verification of the suspect with this key.
        evidence_bits: evidence after the correction for the number of recipients, at least 0.
        traced: whether this evidence reaches the required minimum.
    """

    kit: str
    recipient: str | None
    verdict: Verdict
    evidence_bits: float
    traced: bool


def trace(settings: TraceSettings) -> list[TracedRecipient]:
    """Read a suspect with the keys of all recipients; return the results, strongest evidence first.

    Raises:
        KeyMaterialError: a kit does not open.
        ArtifactError, ModelError, StorageError: the model or a kit cannot be fetched.
    """
    model = read_model(settings.model, endpoint=settings.endpoint)
    correction = math.log2(len(settings.kits))
    results = []
    for location in settings.kits:
        kit = open_kit(settings, location)
        detector = detector_for_kit(kit, settings.trusted_factory)
        required = settings.min_evidence_bits + correction
        verdict = verify(model.tensors, detector, bits=required, model_digest=model.digest)
        name = kit.info.get("recipient")
        results.append(
            TracedRecipient(
                kit=location,
                recipient=name if isinstance(name, str) else None,
                verdict=verdict,
                evidence_bits=max(0.0, verdict.evidence_bits - correction),
                traced=verdict.evidence_bits >= required,
            )
        )
    return sorted(results, key=lambda result: -result.evidence_bits)


def traced_copy(
    kits: Sequence[OwnerKit], suspect: Mapping[str, Tensor], *, bits: float, factory: str | None = None
) -> list[OwnerKit]:
    """Return the kits of the copy that a suspect was made from, the one with the most evidence of several.

    Args:
        kits: kits of several copies of one W0; a copy has one kit for each of its keys.
        suspect: tensors of the suspect.
        bits: evidence that one key of the copy must reach after the correction for the number of keys.
        factory: trusted factory of a custom architecture.

    Returns:
        The kits of this copy in their order; none if no copy reaches the evidence.
    """
    correction = math.log2(len(kits))
    copies: dict[object, list[OwnerKit]] = {}
    strongest: dict[object, float] = {}
    for kit in kits:
        copy = kit.info.get("model_digest")
        evidence = verify(suspect, detector_for_kit(kit, factory), bits=bits + correction).evidence_bits
        copies.setdefault(copy, []).append(kit)
        strongest[copy] = max(strongest.get(copy, 0.0), evidence - correction)
    best = max(strongest, key=lambda copy: strongest[copy])
    return copies[best] if strongest[best] >= bits else []
