"""Which claims may be judged at all: what the ledger alone says against one, as a closed list of faults.

Nothing here looks at a model. A claim with a fault is answered, not refused: its standing is `not_supported`,
with the fault as the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mtlsign.claims import merkle
from mtlsign.claims.ledger.view import Entry, LedgerView
from mtlsign.claims.statements import commitments
from mtlsign.claims.statements.types import Claim, Publish, Ref, Register
from mtlsign.errors import ClaimError, KeyMaterialError

FAULTS = {
    "no_publication": "it names no publication of this ledger",
    "claim_before_publication": "it was made before the publication that it names",
    "bad_opening": "what it opens is no well-formed, properly signed key",
    "somebody_elses_key": "publication, claim and key are not all by the same identity",
    "key_not_committed": "the key that it opens is not the one that was committed",
    "head_not_committed": "the head that it names does not hash to the commitment",
    "model_not_committed": "the marked model that it names is not the one that was committed",
    "no_registration": "the model that it accuses was not registered before",
    "opened_before_registered": "its key had been opened before the model that it accuses was registered",
    "key_out_of_order": "the publication's keys are opened in order, and this one is not the next",
}


@dataclass(frozen=True, slots=True)
class InadmissibilityReason:
    """One thing said against a claim: a code of FAULTS."""

    code: str

    @property
    def sentence(self) -> str:
        """For a person."""
        return FAULTS[self.code]


def find_claim(view: LedgerView, name: str) -> tuple[Entry, Claim]:
    """The claim of that id: its entry's hash (64 hex) or number.

    Raises:
        ClaimError: there is no such entry, or it is no claim.
    """
    for entry, claim in view.all(Claim):
        if name in (str(entry.index), entry.leaf.hex()):
            return entry, claim
    raise ClaimError(f"{name[:80]!r} names no claim of this ledger; see jobs/ledger.py list", field="claims")


def first_opening(view: LedgerView, claim: Claim) -> int | None:
    """Number of the first entry that reveals this claim's key to everybody."""
    return next((entry.index for entry, other in view.all(Claim) if other.opening == claim.opening), None)


def inadmissibility_reasons(
    view: LedgerView, entry: Entry, claim: Claim
) -> tuple[InadmissibilityReason, ...]:
    """Everything that the ledger says against the claim, in the order of FAULTS; empty: it may be judged."""
    publication = view.at(claim.publish, Publish)
    wrong: dict[str, Callable[[], bool]] = {
        "no_publication": lambda: publication is None,
        "claim_before_publication": lambda: claim.publish.index >= entry.index,
        "bad_opening": lambda: not _is_valid_opening(claim),
        "somebody_elses_key": lambda: (
            claim.opening.public_key != claim.signer
            or (publication is not None and publication.signer != claim.signer)
        ),
        "no_registration": lambda: _registered(view, claim.register, claim.suspect, entry.index) is None,
        "opened_before_registered": lambda: (
            claim.register.index > (first_opening(view, claim) or entry.index)
        ),
    }
    if publication is not None and _is_valid_opening(claim):
        wrong |= {
            "key_not_committed": lambda: not key_is_committed(claim, publication),
            "head_not_committed": lambda: not _head_is_committed(claim, publication),
            "model_not_committed": lambda: (
                commitments.commit_model(claim.model_salt, claim.signer, claim.model) != publication.model
            ),
            "key_out_of_order": lambda: not _in_order(view, entry, claim),
        }
    return tuple(InadmissibilityReason(code) for code in FAULTS if code in wrong and wrong[code]())


def _is_valid_opening(claim: Claim) -> bool:
    try:
        claim.opening.key()
    except KeyMaterialError:
        return False
    return True


def key_is_committed(claim: Claim, publication: Publish) -> bool:
    """Whether the opened key is number `key_index` under the publication's root."""
    leaf = merkle.leaf_hash(commitments.commit_key(claim.key_salt, claim.opening.key()))
    return merkle.verify_inclusion(
        leaf, claim.key_index, publication.keys_count, claim.key_path, publication.keys_root
    )


def _head_is_committed(claim: Claim, publication: Publish) -> bool:
    if len(claim.heads) != publication.keys_count or claim.key_index >= len(claim.heads):
        return False
    free = claim.opening.parse().head.kind == "free"
    if free != (claim.heads[claim.key_index] is not None):
        return False
    return commitments.commit_heads(claim.heads_salt, claim.signer, claim.heads) == publication.heads


def _registered(view: LedgerView, ref: Ref, digest: bytes, before: int) -> Register | None:
    found = view.at(ref, Register)
    if found is None or ref.index >= before or digest not in [d for _, d in found.models]:
        return None
    return found


def _in_order(view: LedgerView, entry: Entry, claim: Claim) -> bool:
    """Keys open in the committed order; one that is open already may serve again (for what was
    registered).
    """
    opened = opened_keys(view, claim.publish, entry.index)
    return claim.key_index in opened or all(index in opened for index in range(claim.key_index))


def opened_keys(view: LedgerView, ref: Ref, before: int) -> dict[int, int]:
    """Which keys of a publication its owner's earlier claims opened: key's number → number of the first
    entry.
    """
    publication, opened = view.at(ref, Publish), dict[int, int]()
    for entry, claim in view.all(Claim):
        if entry.index >= before or publication is None:
            break
        ours = claim.publish == ref and claim.signer == publication.signer
        if ours and _is_valid_opening(claim) and key_is_committed(claim, publication):
            opened.setdefault(claim.key_index, first_opening(view, claim) or entry.index)
    return opened
