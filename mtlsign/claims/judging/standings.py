"""Standings of claims: a closed list, each with a reason code and one sentence for display.

Each reason has exactly one standing and one sentence, so that equal findings have equal texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtlsign.claims.judging.admissibility import REASON_TEXTS

STANDINGS = (
    "in_the_weights", "needs_commitment", "self_attested", "inherited", "prior_art", "undecided",
    "not_supported", "not_verifiable",
)  # fmt: skip

#: reason → (standing, sentence). Fields in braces are filled from the standing's numbers.
REASONS: dict[str, tuple[str, str]] = {
    "accepted": (
        "in_the_weights",
        "The accused model descends from one that the holder of this key changed: a random key passes "
        "with a probability of 2^-{evidence_bits}, and key and marked model were committed by "
        "{published} (POSIX time), before the accused model was registered and the key opened.",
    ),
    "no_other_cosigner": (
        "self_attested",
        "The key is in the accused model with {evidence_bits} bits, but only the claimant attested the "
        "time of its commitment.",
    ),
    "publication_not_counted": (
        "needs_commitment",
        "The key is in the accused model with {evidence_bits} bits, but the publication is not yet "
        "under a confirmed checkpoint.",
    ),
    "free_head": (
        "needs_commitment",
        "A trained head reads {evidence_bits} bits out of the accused model. Such a head can be made "
        "for any model, so this is evidence only if the model did not exist when the head was "
        "committed ({published}).",
    ),
    "built_on_a_marked_model": (
        "inherited",
        "The key is in the accused model, but the model that the claimant committed already carries "
        "the key of claim {other}, whose model does not carry this key: it was built on that model.",
    ),
    "exhibit_before_registration": (
        "inherited",
        "The key is also in a model that another party timestamped (entry {stamp}) before the accused "
        "model was registered (entry {registered}): the accused model may have the watermark from there.",
    ),
    "exhibit_before_publication": (
        "prior_art",
        "The key is also in a model that another party timestamped (entry {stamp}) before this key"
        " was committed (entry {publication}).",
    ),
    "earlier_commitment": (
        "prior_art",
        "Both keys are in both committed models, and that of claim {other} was committed earlier.",
    ),
    "no_order": (
        "undecided",
        "Several claims are consistent, and the ledger does not show which model came first.",
    ),
    "council_disagrees": (
        "undecided",
        "This verification finds {evidence_bits} bits, but the council's outcome is '{council}'. Ask "
        "for a further opinion.",
    ),
    "suspect_not_verifiable": (
        "not_verifiable",
        "The accused model cannot be verified ({why}); it may be marked or not.",
    ),
    "committed_model_not_verifiable": (
        "not_verifiable",
        "The committed model cannot be verified ({why}), so it is unknown whether the commitment was "
        "for a marked model.",
    ),
    "not_in_the_weights": (
        "not_supported",
        "The key is not in the accused model: {evidence_bits} bits of the {bits_required} required.",
    ),
    "evidence_missing": (
        "not_supported",
        "The parts that the claim opens do not belong together: {why}.",
    ),
    "committed_model_unmarked": (
        "not_supported",
        "The committed model does not carry the key: the commitment was not for a marked model.",
    ),
} | {code: ("not_supported", f"The claim is inadmissible: {text}.") for code, text in REASON_TEXTS.items()}


@dataclass(frozen=True)
class Standing:
    """Standing of a claim.

    Attributes:
        claim: id of the claim.
        standing: one of STANDINGS.
        reason: a key of REASONS.
        sentence: the reason's sentence, filled in.
        numbers: findings, times and votes on which the standing rests.
    """

    claim: str
    standing: str
    reason: str
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)


def make_standing(claim: str, reason: str, numbers: dict[str, Any], **details: object) -> Standing:
    """Return the standing of a reason with its sentence filled in.

    Args:
        claim: id of the claim.
        reason: a key of REASONS.
        numbers: findings, times and votes.
        details: further fields of the sentence.
    """
    standing, text = REASONS[reason]
    values = {**numbers, "evidence_bits": f"{numbers['evidence_bits']:.1f}"} | details
    return Standing(claim, standing, reason, text.format(**values), numbers)
