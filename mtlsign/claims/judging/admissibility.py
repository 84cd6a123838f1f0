"""Admissibility of claims: a closed list of reasons, decided from the ledger alone, without any model.

An inadmissible claim gets the standing `not_supported` with the reason; it is not an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mtlsign.claims import merkle
from mtlsign.claims.ledger.view import Entry, LedgerView
from mtlsign.claims.statements import commitments
from mtlsign.claims.statements.types import Claim, Publish, Ref, Register
from mtlsign.errors import ClaimError, KeyMaterialError

REASON_TEXTS = {
    "no_publication": "it refers to no publication of this ledger",
    "claim_before_publication": "it was made before the publication that it refers to",
    "bad_opening": "its opening is not a well-formed and properly signed key",
    "signer_mismatch": "publication, claim and key do not have the same author",
    "key_not_committed": "the opened key does not match the commitment",
    "head_not_committed": "the named head does not match the commitment",
    "model_not_committed": "the named marked model does not match the commitment",
    "no_registration": "the accused model was not registered before the claim",
    "opened_before_registered": "the key had been opened before the accused model was registered",
    "key_out_of_order": "the keys of a publication are opened in order, and this one is not the next",
}


@dataclass(frozen=True, slots=True)
class InadmissibilityReason:
    """Reason why a claim is inadmissible. `code` is a key of REASON_TEXTS."""

    code: str

    @property
    def sentence(self) -> str:
        """Clause for display, without subject and full stop."""
        return REASON_TEXTS[self.code]


def find_claim(view: LedgerView, name: str) -> tuple[Entry, Claim]:
    """Return the claim with the id `name`: its leaf hash (64 hexadecimal digits) or its index.

    Raises:
        ClaimError: there is no such entry, or it is not a claim.
    """
    for entry, claim in view.all(Claim):
        if name in (str(entry.index), entry.leaf.hex()):
            return entry, claim
    raise ClaimError(
        f"{name[:80]!r} is not a claim of this ledger. List the claims with jobs/ledger.py list.",
        field="claims",
    )


def first_opening(view: LedgerView, claim: Claim) -> int | None:
    """Return the index of the first entry that makes this claim's key public, or None.

    An entry without effect, such as a copy from another ledger, makes the key public as well.
    """
    return next((e.index for e in view.entries.values() if e.opening == claim.opening), None)


def first_registration(view: LedgerView, digest: bytes) -> int | None:
    """Return the index of the first entry that registers the model with this digest, or None."""
    registrations = view.all(Register)
    return next((e.index for e, r in registrations if digest in [d for _, d in r.models]), None)


def inadmissibility_reasons(
    view: LedgerView, entry: Entry, claim: Claim
) -> tuple[InadmissibilityReason, ...]:
    """Return all reasons against a claim in the order of REASON_TEXTS. Without any, it is admissible.

    Args:
        view: the ledger.
        entry: entry of the claim.
        claim: its statement.
    """
    publication = view.at(claim.publish, Publish)
    applies: dict[str, Callable[[], bool]] = {
        "no_publication": lambda: publication is None,
        "claim_before_publication": lambda: claim.publish.index >= entry.index,
        "bad_opening": lambda: not _is_valid_opening(claim),
        "signer_mismatch": lambda: (
            claim.opening.public_key != claim.signer
            or (publication is not None and publication.signer != claim.signer)
        ),
        "no_registration": lambda: _registered(view, claim.register, claim.suspect, entry.index) is None,
        "opened_before_registered": lambda: (
            claim.register.index > (first_opening(view, claim) or entry.index)
        ),
    }
    if publication is not None and _is_valid_opening(claim):
        applies |= {
            "key_not_committed": lambda: not key_is_committed(claim, publication),
            "head_not_committed": lambda: not _head_is_committed(claim, publication),
            "model_not_committed": lambda: (
                commitments.commit_model(claim.model_salt, claim.signer, claim.model) != publication.model
            ),
            "key_out_of_order": lambda: not _is_in_order(view, entry, claim),
        }
    return tuple(InadmissibilityReason(code) for code in REASON_TEXTS if code in applies and applies[code]())


def _is_valid_opening(claim: Claim) -> bool:
    try:
        claim.opening.key()
    except KeyMaterialError:
        return False
    return True


def key_is_committed(claim: Claim, publication: Publish) -> bool:
    """Return whether the opened key is number `key_index` under the publication's root."""
    leaf = merkle.leaf_hash(commitments.commit_key(claim.key_salt, claim.opening.key()))
    return merkle.verify_inclusion(
        leaf, claim.key_index, publication.keys_count, claim.key_path, publication.keys_root
    )


def _head_is_committed(claim: Claim, publication: Publish) -> bool:
    if len(claim.heads) != publication.keys_count or claim.key_index >= len(claim.heads):
        return False
    is_trained = claim.opening.parse().head.kind == "free"
    if is_trained != (claim.heads[claim.key_index] is not None):
        return False
    return commitments.commit_heads(claim.heads_salt, claim.signer, claim.heads) == publication.heads


def _registered(view: LedgerView, ref: Ref, digest: bytes, before: int) -> Register | None:
    registration = view.at(ref, Register)
    if registration is None or ref.index >= before or digest not in [d for _, d in registration.models]:
        return None
    return registration


def _is_in_order(view: LedgerView, entry: Entry, claim: Claim) -> bool:
    """Return whether all keys before the claim's key are open, or this key is open already.

    An open key can support further claims on models that were registered before it was opened.
    """
    opened = opened_keys(view, claim.publish, entry.index)
    return claim.key_index in opened or all(index in opened for index in range(claim.key_index))


def opened_keys(view: LedgerView, ref: Ref, before: int) -> dict[int, int]:
    """Return the keys of a publication that its owner's claims opened: key number → index of the first entry.

    Args:
        view: the ledger.
        ref: the publication.
        before: only claims with a smaller index are considered.
    """
    publication, opened = view.at(ref, Publish), dict[int, int]()
    for entry, claim in view.all(Claim):
        if entry.index >= before or publication is None:
            break
        by_owner = claim.publish == ref and claim.signer == publication.signer
        if by_owner and _is_valid_opening(claim) and key_is_committed(claim, publication):
            opened.setdefault(claim.key_index, first_opening(view, claim) or entry.index)
    return opened
