"""Result of a checked bundle as JSON values, for `--json`, model cards and the report page."""

from __future__ import annotations

from typing import Any

from mtlsign.claims.bundle import CheckedBundle
from mtlsign.claims.judging.council import CountedVote
from mtlsign.claims.statements.types import Publish, Register

CAVEAT = "A bundle cannot show that the ledger lacks further entries. Check the ledger for that."
UNPINNED = (
    "No checkpoint from another source was given, so the bundle only confirms itself: its council may be "
    "invented. Get a checkpoint from a council member and pass it with --head."
)


def to_json(checked: CheckedBundle) -> dict[str, Any]:
    """Return standing, sentence, numbers, parties, policy and checkpoint of a checked bundle."""
    standing, claim, view = checked.dispute.standings[0], checked.claim, checked.view
    checkpoint = checked.checkpoint
    confirmed = next(item for item in view.confirmed if item.checkpoint == checkpoint)
    council = view.council(checked.entry.index)
    publication, registration = view.at(claim.publish, Publish), view.at(claim.register, Register)
    names = [name for name, digest in registration.models if digest == claim.suspect] if registration else []
    return {
        "claim": checked.entry.leaf.hex(),
        "claimant": claim.signer.hex(),
        "standing": standing.standing,
        "reason": standing.reason,
        "sentence": standing.sentence,
        "numbers": standing.numbers,
        "ledger": view.origin.hex(),
        "head": {"size": checkpoint.size, "root": checkpoint.root.hex(), "pinned": checked.pinned},
        "council": {
            "members": [member.hex() for member in council.members],
            "threshold": council.threshold,
            "bits": council.bits,
            "window": council.window,
            "cosigned": {member.hex(): time for member, time in sorted(confirmed.times.items())},
            "checkpoint_time": confirmed.time,
            "checkpoint_members": len(view.council(checkpoint.size).members),
        },
        "times": {
            "published": view.time(claim.publish.index),
            "registered": view.time(claim.register.index),
            "claimed": view.time(checked.entry.index),
        },
        "votes": [_vote(vote, view.time(vote.index)) for vote in checked.votes],
        "suspect": claim.suspect.hex(),
        "suspect_name": names[0] if names else None,
        "marked_model": claim.model.hex(),
        "licence": publication.licence if publication else None,
        "recipient": publication.recipient if publication else None,
        "remarks": list(view.warnings),
        "caveat": CAVEAT if checked.pinned else f"{UNPINNED} {CAVEAT}",
    }


def _vote(vote: CountedVote, time: int | None) -> dict[str, Any]:
    return {
        "member": vote.member.hex(), "status": vote.vote.status, "counts": vote.counts,
        "problem": vote.problem, "evidence_bits": vote.vote.millibits / 1000, "time": time,
    }  # fmt: skip
