"""Standings of claims: a closed list, each with a reason code and one sentence for display.

Each reason has exactly one standing and one sentence, so that equal findings have equal texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtlsign.claims.judging.admissibility import REASON_TEXTS
from mtlsign.reports.formatting import utc_time

STANDINGS = (
    "supported", "needs_commitment", "self_attested", "inherited", "prior_art", "undecided",
    "not_supported", "not_verifiable",
)  # fmt: skip

#: reason → (standing, sentence). Fields in braces are filled from the standing's numbers.
REASONS: dict[str, tuple[str, str]] = {
    "accepted": (
        "supported",
        "The accused model descends from one that the holder of this key changed: a random key matches "
        "as well with a probability of 2^-{evidence_bits}. Key and marked model were committed by "
        "{published}, before the accused model was registered and before the key was opened.",
    ),
    "no_other_cosigner": (
        "self_attested",
        "The key is in the accused model with {evidence_bits} bits, but only the claimant attested the "
        "time of its commitment.",
    ),
    "checkpoint_not_pinned": (
        "self_attested",
        "The key is in the accused model with {evidence_bits} bits, but the council that attests the time "
        "of its commitment is known from this file alone, and the file's author may have invented it.",
    ),
    "publication_not_counted": (
        "needs_commitment",
        "The key is in the accused model with {evidence_bits} bits, but the publication is not yet "
        "under a confirmed checkpoint.",
    ),
    "registered_before_publication": (
        "needs_commitment",
        "The key is in the accused model with {evidence_bits} bits, but that model was registered (entry "
        "{suspect_registered}) before key and marked model were committed (entry {publication}). The ledger "
        "does not show that the commitment is older than the accused model.",
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
        "the key of claim {other}, whose committed model was not shown to carry this key. "
        "This indicates that the claimant's model descends from that of claim {other}.",
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
        "The key was not shown to be in the accused model: the evidence is {evidence_bits} bits, and "
        "{bits_required} are required. This does not show that the model is unmarked.",
    ),
    "evidence_missing": (
        "not_supported",
        "The parts that the claimant supplied do not allow a verification: {why}.",
    ),
    "committed_model_unmarked": (
        "not_supported",
        "The key was not shown to be in the model that the claimant committed, so the commitment is not "
        "shown to be for a marked model.",
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
    texts = {name: utc_time(numbers[name]) for name in ("published", "claimed") if numbers.get(name)}
    values = {**numbers, **texts, "evidence_bits": f"{numbers['evidence_bits']:.1f}"} | details
    return Standing(claim, standing, reason, text.format(**values), numbers)
