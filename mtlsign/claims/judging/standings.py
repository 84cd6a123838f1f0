"""What may be said of one claim among people: a standing from a closed list, its reason, one sentence.

Each reason has one standing and one sentence, below, so that the same facts always read the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtlsign.claims.judging.admissibility import FAULTS

STANDINGS = (
    "in_the_weights", "needs_commitment", "self_attested", "inherited", "prior_art", "undecided",
    "not_supported", "not_verifiable",
)  # fmt: skip

#: reason → (standing, sentence). Braces are filled from the standing's numbers.
REASONS: dict[str, tuple[str, str]] = {
    "accepted": (
        "in_the_weights",
        "The accused model descends from one that the holder of this key changed: by chance this "
        "happens once in 2^{evidence_bits} keys, and key and marked model were committed by "
        "{published} (POSIX time), before the accused model was registered and the key opened.",
    ),
    "nobody_else_cosigned": (
        "self_attested",
        "The key is in the accused model with {evidence_bits} bits, but nobody except the claimant "
        "attested when it was committed.",
    ),
    "publication_not_counted": (
        "needs_commitment",
        "The key is in the accused model with {evidence_bits} bits, but the publication is not yet "
        "under a head that enough of the council co-signed.",
    ),
    "free_head": (
        "needs_commitment",
        "A trained head reads {evidence_bits} bits out of the accused model; such a head can be made "
        "for any model, so this is evidence only if that model did not exist when the head was "
        "committed ({published}).",
    ),
    "built_on_a_marked_model": (
        "inherited",
        "The key is in the accused model, but the model that the claimant committed already carries "
        "the key of claim {other}, whose model does not carry this one: it was built on that.",
    ),
    "exhibit_before_registration": (
        "inherited",
        "The key is also in a model that somebody else had stamped (entry {stamp}) before the accused "
        "model was registered (entry {registered}): the accused model may have the mark from that one.",
    ),
    "exhibit_before_publication": (
        "prior_art",
        "The key is also in a model that somebody else had stamped (entry {stamp}) before this key"
        " was committed (entry {publication}).",
    ),
    "earlier_commitment": (
        "prior_art",
        "Both keys are in both committed models, and that of claim {other} was committed earlier.",
    ),
    "no_order": (
        "undecided",
        "Several claims fit, and nothing tells which model came first.",
    ),
    "council_disagrees": (
        "undecided",
        "This verification finds {evidence_bits} bits, but the council's outcome is '{council}': ask "
        "for a further opinion.",
    ),
    "suspect_not_verifiable": (
        "not_verifiable",
        "The accused model cannot be verified ({why}); it may be marked or not.",
    ),
    "committed_model_not_verifiable": (
        "not_verifiable",
        "The model that was committed cannot be verified ({why}), so it is not known whether the "
        "commitment was for a marked model.",
    ),
    "not_in_the_weights": (
        "not_supported",
        "The key is not in the accused model: {evidence_bits} bits of the {bits_required} required.",
    ),
    "evidence_missing": (
        "not_supported",
        "What the claim opens does not fit together: {why}.",
    ),
    "committed_model_unmarked": (
        "not_supported",
        "The model that was committed does not carry the key: the commitment was not for a marked model.",
    ),
} | {code: ("not_supported", f"The claim does not hold: {text}.") for code, text in FAULTS.items()}


@dataclass(frozen=True)
class Standing:
    """A claim's standing: one of STANDINGS, the reason's code, one sentence for a person, the numbers."""

    claim: str
    standing: str
    reason: str
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)


def say(claim: str, reason: str, numbers: dict[str, Any], **more: object) -> Standing:
    """The standing that a reason gives, its sentence filled in."""
    standing, text = REASONS[reason]
    shown = {**numbers, "evidence_bits": f"{numbers['evidence_bits']:.1f}"} | more
    return Standing(claim, standing, reason, text.format(**shown), numbers)
