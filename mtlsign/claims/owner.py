"""Operations of an owner or accused party on a ledger: create, publish, register, claim, exhibit.

Every function can be called again after a failure: it detects completed steps and never repeats them.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtlsign.claims.blob_store import BlobStore
from mtlsign.claims.claim_plan import claim_statement, plan_claim
from mtlsign.claims.exposure import first_disclosure
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.kit_commitments import KitCommitments, commitment_salt, model_commitment, model_digest
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.view import Entry, IncrementalReader, LedgerView
from mtlsign.claims.ledger.witness import Witness
from mtlsign.claims.ledger.witness_state import refuse_known_store
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Claim, Exhibit, Membership, Publish, Ref, Register, Statement
from mtlsign.errors import ClaimError, LedgerError
from mtlsign.watermark.keys.identity import Identity

if TYPE_CHECKING:
    from mtlsign.watermark.kit import OwnerKit

Clock = Callable[[], float]
POLL_S = 0.5


class UnconfirmedRegistrationError(ClaimError):
    """The registration of the accused model is not under a confirmed checkpoint yet; no key was opened."""

    def __init__(self, registration: Ref) -> None:
        super().__init__(
            f"The registration (entry {registration.index}) is not under a confirmed checkpoint yet; no key "
            "was opened. Run the job once more when the council has co-signed.",
            field="confirmation-timeout",
        )
        self.registration = registration


class Owner:
    """Identity at a ledger. A council member co-signs as its own witness after each append.

    Args:
        identity: the author of statements.
        ledger: the ledger.
        witness_state: file of the witness; default: next to the default identity.
        clock: returns POSIX seconds.
    """

    def __init__(
        self,
        identity: Identity,
        ledger: Ledger,
        witness_state: Path | None = None,
        clock: Clock = time.time,
    ) -> None:
        self.identity, self.ledger, self.witness_state, self.clock = identity, ledger, witness_state, clock
        self._reader = IncrementalReader(ledger)

    @property
    def public_key(self) -> bytes:
        """Public key of the identity, 32 bytes."""
        return self.identity.public_key

    def view(self) -> LedgerView:
        """Return the current view of the ledger."""
        return self._reader.view()

    def append(self, statement: Statement) -> Ref:
        """Sign and append a statement, co-sign if the identity is a council member, and return the entry."""
        data = sign_statement(statement, self.identity)
        index = self.ledger.append(data)
        view = self.view()
        entry = view.entries[index]
        if entry.statement != statement:
            raise LedgerError(
                f"Entry {index} differs from the appended statement. Do not use this ledger.", field="ledger"
            )
        if self.public_key in view.council(self.ledger.size()).members:
            Witness(
                self.identity, self.ledger, self.witness_state, clock=self.clock,
                reader=self._reader,
            ).run_once()  # fmt: skip
        return entry.ref

    def now(self) -> int:
        """Return the time by the owner's clock in whole POSIX seconds."""
        return int(self.clock())


def create_ledger(
    owner: Owner, members: Sequence[bytes], *, threshold: int | None = None, bits: int = 120,
    window: int = 14 * 86_400,
) -> Ref:  # fmt: skip
    """Create a ledger by its first entry, which names the council.

    Args:
        owner: author of the entry.
        members: public keys of the council members.
        threshold: members that must agree; default: more than half.
        bits: evidence in bits from which the council accepts.
        window: seconds after a claim in which votes count.

    Raises:
        LedgerError: the ledger has entries, or the owner is a witness of an earlier ledger in this store.
    """
    if owner.ledger.size():
        raise LedgerError(
            "The ledger exists already. Change its council with jobs/ledger.py members.", field="ledger"
        )
    if owner.public_key in members:
        refuse_known_store(owner.identity, owner.ledger.store_id, owner.witness_state)
    statement = Membership(
        signer=owner.public_key,
        ledger=None,
        time=owner.now(),
        members=tuple(sorted(set(members))),
        threshold=len(set(members)) // 2 + 1 if threshold is None else threshold,
        bits=bits,
        window=window,
    )
    ref = owner.append(statement)
    if ref.index != 0:
        raise LedgerError("Another party created the ledger first. Inspect its entry 0.", field="ledger")
    return ref


def publish(
    owner: Owner, kits: Sequence[OwnerKit], *, licence: str = "", recipient: str = ""
) -> tuple[Entry, Publish]:
    """Commit to the keys, heads and marked model of the kits of one model, before the model is released.

    For the same kits, licence and recipient the existing publication is returned.

    Args:
        owner: owner of the kits.
        kits: kits of one model, in the order in which their keys will be opened.
        licence: public text.
        recipient: public text.

    Raises:
        KeyMaterialError: a kit is damaged or belongs to another identity.
        ClaimError: the kits are for different models.
    """
    view, committed = owner.view(), KitCommitments(owner.identity, kits)
    for entry, publication in view.all(Publish):
        has_same_texts = (publication.licence, publication.recipient) == (licence, recipient)
        if has_same_texts and committed.matches(publication):
            return entry, publication
    nonce = secrets.token_bytes(32)
    statement = Publish(
        signer=owner.public_key,
        ledger=view.origin,
        time=owner.now(),
        nonce=nonce,
        keys_root=committed.keys_root(nonce),
        keys_count=len(committed.keys),
        heads=committed.heads_commitment(nonce),
        model=committed.model_commitment(nonce),
        licence=licence,
        recipient=recipient,
    )
    ref = owner.append(statement)
    return owner.view().entries[ref.index], statement


def register(owner: Owner, archive: BlobStore, models: Sequence[tuple[str, bytes]]) -> Ref:
    """Archive suspect models and append an entry that timestamps their digests.

    Args:
        owner: author of the entry.
        archive: receives the models.
        models: (name, safetensors bytes) of each model.
    """
    digests = tuple((name, archive.put(data)) for name, data in models)
    statement = Register(
        signer=owner.public_key, ledger=owner.ledger.origin(), time=owner.now(), models=digests
    )
    return owner.append(statement)


def claim(
    owner: Owner,
    kits: Sequence[OwnerKit],
    archive: BlobStore,
    suspect: bytes,
    *,
    own_model: bytes | None = None,
    suspect_name: str = "suspect",
    confirmation_timeout: float = 0.0,
) -> tuple[Entry, Claim]:
    """Register a suspect model, then open one key of a publication against it.

    An opened key supports only claims on models that were registered before.

    Args:
        owner: author of the publication.
        kits: kits of the publication, in its order.
        archive: receives the suspect, the reference, a trained head, and the marked model.
        suspect: safetensors bytes of the suspect model.
        own_model: bytes of the marked model, which the lineage needs; the archive may have them already.
        suspect_name: name of the suspect in the registration.
        confirmation_timeout: seconds to wait until a checkpoint confirms the registration, *before* the key
            is opened. With 0 the key is opened at once; a party that can rewrite the store could then still
            delete the registration.

    Raises:
        ClaimError: the kits are not published, every key is spent, or the registration was not confirmed in
            time. No key was opened then.
    """
    view, committed = owner.view(), KitCommitments(owner.identity, kits)
    digest = hashlib.sha256(suspect).digest()
    plan = plan_claim(view, committed, digest)
    if own_model is not None and hashlib.sha256(own_model).digest() != committed.model_digest:
        raise ClaimError(
            "The model does not belong to the kit. Pass the model that was published.", field="own-model"
        )
    if plan.earlier is not None:
        return plan.earlier
    _archive_claim_parts(archive, suspect, own_model, kits)
    registration = plan.registration or register(owner, archive, [(suspect_name, suspect)])
    _wait_for_confirmation(owner, registration, confirmation_timeout)
    statement = claim_statement(
        plan, committed, registration, digest, signer=owner.public_key, ledger=view.origin, time=owner.now()
    )
    ref = owner.append(statement)
    return owner.view().entries[ref.index], statement


def _archive_claim_parts(
    archive: BlobStore, suspect: bytes, own_model: bytes | None, kits: Sequence[OwnerKit]
) -> None:
    archive.put(suspect)
    for data in (own_model, *(kit.reference for kit in kits), *(kit.head for kit in kits)):
        if data is not None:
            archive.put(data)


def exhibit(owner: Owner, archive: BlobStore, claim_id: str, model: bytes) -> Ref:
    """Answer a claim with an own model that an earlier publication or registration timestamps.

    Args:
        owner: the accused party.
        archive: receives the model.
        claim_id: id or index of the claim.
        model: safetensors bytes of the exhibited model.

    Raises:
        ClaimError: no entry timestamps that model for this party.
    """
    view = owner.view()
    claim_entry, _ = find_claim(view, claim_id)
    digest = archive.put(model)
    salt: bytes | None = None
    stamp: Ref | None = None
    for entry, publication in view.all(Publish):
        is_own = publication.signer == owner.public_key
        if is_own and model_commitment(owner.identity, publication.nonce, digest) == publication.model:
            stamp, salt = entry.ref, commitment_salt(owner.identity, publication.nonce, "model")
            break
    for entry, registration in view.all(Register):
        is_earlier = stamp is None or entry.index < stamp.index
        if is_earlier and digest in [d for _, d in registration.models]:
            stamp, salt = entry.ref, None
            break
    if stamp is None:
        raise ClaimError(
            "No entry timestamps the model. Pass a model that was published or registered earlier.",
            field="model",
        )
    statement = Exhibit(
        signer=owner.public_key,
        ledger=view.origin,
        time=owner.now(),
        claim=claim_entry.ref,
        stamp=stamp,
        model=digest,
        salt=salt,
    )
    return owner.append(statement)


def already_disclosed(owner: Owner, kits: Sequence[OwnerKit]) -> int | None:
    """Return the index of the first entry that names the kits' marked model openly, or None."""
    return first_disclosure(owner.view(), model_digest(kits))


def _wait_for_confirmation(owner: Owner, registration: Ref, seconds: float) -> None:
    end = time.monotonic() + seconds
    while seconds > 0 and owner.view().time(registration.index) is None:
        if time.monotonic() > end:
            raise UnconfirmedRegistrationError(registration)
        time.sleep(POLL_S)
