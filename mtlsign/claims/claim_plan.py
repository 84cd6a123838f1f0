"""Plan of a claim: the registration and the key that it would use. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtlsign.claims.judging.admissibility import opened_keys
from mtlsign.claims.kit_commitments import KitCommitments, commitment_salt
from mtlsign.claims.ledger.view import Entry, LedgerView
from mtlsign.claims.statements.types import Claim, Publish, Ref, Register
from mtlsign.errors import ClaimError


@dataclass(frozen=True)
class ClaimPlan:
    """Steps of a claim.

    Attributes:
        published: entry of the publication.
        publication: its statement.
        earlier: the owner's earlier claim on the same model, which is returned instead of a new one.
        registration: registration of the accused model, or None if the claim has to append one.
        key_index: number of the key that the claim opens.
    """

    published: Entry
    publication: Publish
    earlier: tuple[Entry, Claim] | None
    registration: Ref | None
    key_index: int


def plan_claim(view: LedgerView, committed: KitCommitments, suspect: bytes) -> ClaimPlan:
    """Return the plan of a claim on the model with the digest `suspect`.

    Args:
        view: the ledger.
        committed: the owner's kits.
        suspect: SHA-256 of the accused model.

    Raises:
        ClaimError: the kits are not published, or every key is spent.
    """
    published, publication = find_publication(view, committed)
    signer = committed.identity.public_key
    for entry, claim in view.all(Claim):
        if (claim.publish, claim.suspect, claim.signer) == (published.ref, suspect, signer):
            return ClaimPlan(published, publication, (entry, claim), claim.register, claim.key_index)
    opened = opened_keys(view, published.ref, len(view.entries))
    registration, index = _choose_registration(view, suspect, opened, publication.keys_count)
    return ClaimPlan(published, publication, None, registration, index)


def find_publication(view: LedgerView, committed: KitCommitments) -> tuple[Entry, Publish]:
    """Return the owner's earliest publication of these kits in this order.

    Raises:
        ClaimError: there is none.
    """
    for entry, publication in view.all(Publish):
        if committed.matches(publication):
            return entry, publication
    raise ClaimError("The kit is not published in this ledger. Run jobs/publish.py first.", field="kit")


def claim_statement(
    plan: ClaimPlan, committed: KitCommitments, registration: Ref, suspect: bytes, **common: Any
) -> Claim:
    """Return the statement that opens the planned key.

    Args:
        plan: the plan.
        committed: the owner's kits.
        registration: registration of the accused model.
        suspect: SHA-256 of the accused model.
        **common: `signer`, `ledger` and `time`.
    """
    nonce, index, identity = plan.publication.nonce, plan.key_index, committed.identity
    return Claim(
        publish=plan.published.ref,
        register=registration,
        suspect=suspect,
        opening=committed.kits[index].opening,
        key_index=index,
        key_salt=committed.key_salt(nonce, index),
        key_path=committed.key_path(nonce, index),
        heads=committed.heads,
        heads_salt=commitment_salt(identity, nonce, "head"),
        model=committed.model_digest,
        model_salt=commitment_salt(identity, nonce, "model"),
        **common,
    )


def _choose_registration(
    view: LedgerView, digest: bytes, opened: dict[int, int], count: int
) -> tuple[Ref | None, int]:
    """Return a registration to use (None: create one) and the number of the key to open against it."""
    registrations = [
        entry.ref for entry, statement in view.all(Register) if digest in [d for _, d in statement.models]
    ]
    for index, opening_entry in sorted(opened.items()):
        for registration in registrations:  # an open key still supports models registered before it
            if registration.index < opening_entry:
                return registration, index
    next_key = len(opened)
    if next_key >= count:
        raise ClaimError(
            f"All {count} keys of this publication are spent, and an opened key does not support a model "
            "registered later. Publish further keys before the next release.",
            field="kit",
        )
    return (registrations[0] if registrations else None), next_key
