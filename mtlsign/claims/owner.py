"""What an owner does with a ledger: found one, publish, register a suspect, claim; and what an accused
answers.

Every function may be called again after a failure: it finds what it already did and never does it twice.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtlsign.claims.blob_store import BlobStore
from mtlsign.claims.exposure import first_disclosure
from mtlsign.claims.judging.admissibility import find_claim, opened_keys
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.view import Entry, IncrementalReader, LedgerView
from mtlsign.claims.ledger.witness import Witness
from mtlsign.claims.ledger.witness_state import refuse_known_store
from mtlsign.claims.statements import commitments
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Claim, Exhibit, Membership, Publish, Ref, Register, Statement
from mtlsign.errors import ClaimError, KeyMaterialError, LedgerError
from mtlsign.watermark.keys.identity import Identity

if TYPE_CHECKING:
    from mtlsign.watermark.kit import OwnerKit

Clock = Callable[[], float]
POLL_S = 0.5


class Owner:
    """An identity at a ledger. If it is a member of the council, it co-signs as its own witness."""

    def __init__(
        self, identity: Identity, ledger: Ledger, memory: Path | None = None, clock: Clock = time.time
    ) -> None:
        self.identity, self.ledger, self.memory, self.clock = identity, ledger, memory, clock
        self._reader = IncrementalReader(ledger)

    def view(self) -> LedgerView:
        """The ledger as it is now."""
        return self._reader.view()

    def append(self, statement: Statement) -> Ref:
        """Sign, append and, as a member, co-sign; returns the entry."""
        data = sign_statement(statement, self.identity)
        index = self.ledger.append(data)
        view = self.view()
        entry = view.entries[index]
        if entry.statement != statement:
            raise LedgerError(f"entry {index} is not what was appended; trust it no more", field="ledger")
        if self.identity.public_key in view.council(self.ledger.size()).members:
            Witness(self.identity, self.ledger, self.memory, clock=self.clock).step()
        return entry.ref

    def now(self) -> int:
        """Our clock, whole seconds."""
        return int(self.clock())


def create_ledger(
    owner: Owner, members: Sequence[bytes], *, threshold: int | None = None, bits: int = 120,
    window: int = 14 * 86_400,
) -> Ref:  # fmt: skip
    """Make an empty ledger ours: its first entry names the council. Default threshold: more than half.

    Raises:
        LedgerError: the ledger has entries already, or its place is one where we are a witness of another.
    """
    if owner.ledger.size():
        raise LedgerError("is founded already; change its council with a membership", field="ledger")
    if owner.identity.public_key in members:
        refuse_known_store(owner.identity, owner.ledger.place, owner.memory)
    statement = Membership(
        signer=owner.identity.public_key,
        ledger=None,
        time=owner.now(),
        members=tuple(sorted(set(members))),
        threshold=len(set(members)) // 2 + 1 if threshold is None else threshold,
        bits=bits,
        window=window,
    )
    ref = owner.append(statement)
    if ref.index != 0:
        raise LedgerError("was founded by somebody else meanwhile; look at entry 0", field="ledger")
    return ref


def publish(
    owner: Owner, kits: Sequence[OwnerKit], *, licence: str = "", recipient: str = ""
) -> tuple[Entry, Publish]:
    """Commit to the keys, heads and marked model of one or more kits of one model, before it leaves.

    The same kits with the same licence and recipient again: the publication that is there.

    Raises:
        KeyMaterialError: a kit is another identity's or damaged. ClaimError: the kits are for different
            models.
    """
    view, keys = owner.view(), _keys(owner.identity, kits)
    for entry, old in view.all(Publish):
        if (old.licence, old.recipient) == (licence, recipient) and _is_of(owner, old, keys, kits):
            return entry, old
    nonce = secrets.token_bytes(32)
    statement = Publish(
        signer=owner.identity.public_key,
        ledger=view.origin,
        time=owner.now(),
        nonce=nonce,
        keys_root=commitments.keys_root(_hidden(owner, nonce, keys)),
        keys_count=len(keys),
        heads=commitments.commit_heads(_salt(owner, nonce, "head"), owner.identity.public_key, _heads(kits)),
        model=_hidden_model(owner, nonce, _model(kits)),
        licence=licence,
        recipient=recipient,
    )
    ref = owner.append(statement)
    return owner.view().entries[ref.index], statement


def find_publication(owner: Owner, view: LedgerView, kits: Sequence[OwnerKit]) -> tuple[Entry, Publish]:
    """Our earliest publication of these kits, in their order. Raises ClaimError when there is none."""
    keys = _keys(owner.identity, kits)
    for entry, old in view.all(Publish):
        if _is_of(owner, old, keys, kits):
            return entry, old
    raise ClaimError("is not published in this ledger; jobs/publish.py comes first", field="kit")


def register(owner: Owner, archive: BlobStore, models: Sequence[tuple[str, bytes]]) -> Ref:
    """Archive suspects' bytes and stamp their digests: (name, safetensors bytes) each."""
    found = tuple((name, archive.put(data)) for name, data in models)
    statement = Register(
        signer=owner.identity.public_key, ledger=owner.ledger.origin(), time=owner.now(), models=found
    )
    return owner.append(statement)


def claim(
    owner: Owner,
    kits: Sequence[OwnerKit],
    archive: BlobStore,
    suspect: bytes,
    *,
    marked: bytes | None = None,
    name: str = "suspect",
    wait: float = 0.0,
) -> tuple[Entry, Claim]:
    """Register a suspect, then open one key of a publication against it. The key is spent from then on.

    Args:
        owner: who published.
        kits: the publication's kits, in its order.
        archive: gets the suspect, the reference, a free head, and the marked model.
        suspect: its safetensors bytes.
        marked: the marked model's bytes; lineage wants them, the archive may have them already.
        name: how the registration calls the suspect.
        wait: seconds to wait until the registration is under a head that counts, *before* the key is opened.
            With 0 the key is opened at once, and whoever can rewrite the store could still drop the
            registration that precedes it.

    Raises:
        ClaimError: not published, every key is spent, or the wait was in vain (nothing was opened then).
    """
    view = owner.view()
    published, publication = find_publication(owner, view, kits)
    digest = hashlib.sha256(suspect).digest()
    if marked is not None and hashlib.sha256(marked).digest() != _model(kits):
        raise ClaimError("is not the model of the kit; give the one that was published", field="marked")
    opened = opened_keys(view, published.ref, owner.ledger.size())
    for entry, old in view.all(Claim):
        if (old.publish, old.suspect, old.signer) == (published.ref, digest, owner.identity.public_key):
            return entry, old
    archive.put(suspect)
    for data in (marked, *(kit.reference for kit in kits), *(kit.head for kit in kits)):
        if data is not None:
            archive.put(data)
    stamp, index = _stamp(view, digest, opened, publication.keys_count)
    if stamp is None:
        stamp = register(owner, archive, [(name, suspect)])
    _wait(owner, stamp, wait)
    keys, nonce = _keys(owner.identity, kits), publication.nonce
    statement = Claim(
        signer=owner.identity.public_key,
        ledger=view.origin,
        time=owner.now(),
        publish=published.ref,
        register=stamp,
        suspect=digest,
        opening=kits[index].opening,
        key_index=index,
        key_salt=_salt(owner, nonce, "key", keys[index]),
        key_path=tuple(commitments.key_path(_hidden(owner, nonce, keys), index)),
        heads=tuple(_heads(kits)),
        heads_salt=_salt(owner, nonce, "head"),
        model=_model(kits),
        model_salt=_salt(owner, nonce, "model"),
    )
    ref = owner.append(statement)
    return owner.view().entries[ref.index], statement


def exhibit(owner: Owner, archive: BlobStore, claim_id: str, model: bytes) -> Ref:
    """Answer a claim: show a model of ours that an earlier entry stamped, ours or a registration.

    Raises:
        ClaimError: no entry stamps that model for us.
    """
    view = owner.view()
    accused, _ = find_claim(view, claim_id)
    digest = archive.put(model)
    salt: bytes | None = None
    stamp: Ref | None = None
    for entry, old in view.all(Publish):
        if old.signer == owner.identity.public_key and _hidden_model(owner, old.nonce, digest) == old.model:
            stamp, salt = entry.ref, _salt(owner, old.nonce, "model")
            break
    for entry, seen in view.all(Register):
        if digest in [d for _, d in seen.models] and (stamp is None or entry.index < stamp.index):
            stamp, salt = entry.ref, None
            break
    if stamp is None:
        raise ClaimError(
            "was stamped by no entry; only a model stamped earlier says something", field="model"
        )
    statement = Exhibit(
        signer=owner.identity.public_key,
        ledger=view.origin,
        time=owner.now(),
        claim=accused.ref,
        stamp=stamp,
        model=digest,
        salt=salt,
    )
    return owner.append(statement)


def already_disclosed(owner: Owner, kits: Sequence[OwnerKit]) -> int | None:
    """The first entry that names the kits' marked model openly, None when the ledger never saw it."""
    return first_disclosure(owner.view(), _model(kits))


def _stamp(view: LedgerView, digest: bytes, opened: dict[int, int], count: int) -> tuple[Ref | None, int]:
    """A registration to use (None: make one) and the number of the key to open against it."""
    stamps = [entry.ref for entry, seen in view.all(Register) if digest in [d for _, d in seen.models]]
    for index, at in sorted(opened.items()):  # an opened key still serves what was registered before
        for stamp in stamps:
            if stamp.index < at:
                return stamp, index
    following = len(opened)
    if following >= count:
        raise ClaimError(
            f"all {count} keys of this publication are spent, and this suspect was registered after that; "
            "an opened key supports nothing newer",
            field="kit",
        )
    return (stamps[0] if stamps else None), following


def _wait(owner: Owner, stamp: Ref, seconds: float) -> None:
    end = time.monotonic() + seconds
    while seconds > 0 and owner.view().time(stamp.index) is None:
        if time.monotonic() > end:
            raise ClaimError(
                f"it is entry {stamp.index}, not yet under a head that counts: no key was opened; "
                "run again once the council has co-signed",
                field="wait",
            )
        time.sleep(POLL_S)


def _keys(identity: Identity, kits: Sequence[OwnerKit]) -> list[bytes]:
    if not kits:
        raise ClaimError("is missing; give at least one", field="kit")
    keys = []
    for kit in kits:
        if kit.opening.public_key != identity.public_key:
            raise KeyMaterialError("is another identity's; give --owner of the kit", field="kit")
        keys.append(kit.opening.key())
    if len(set(keys)) != len(keys):
        raise ClaimError("the same key twice; give different kits", field="kit")
    return keys


def _model(kits: Sequence[OwnerKit]) -> bytes:
    digests = {str(kit.info.get("model_digest")) for kit in kits}
    try:
        if len(digests) != 1:
            raise ClaimError("kits are for different models; publish them apart", field="kit")
        found = bytes.fromhex(digests.pop())
        if len(found) != 32:
            raise ValueError
    except ValueError:
        raise KeyMaterialError("names no model digest; take the kit as it was written", field="kit") from None
    return found


def _heads(kits: Sequence[OwnerKit]) -> list[bytes | None]:
    return [None if kit.head is None else hashlib.sha256(kit.head).digest() for kit in kits]


def _salt(owner: Owner, nonce: bytes, kind: str, *about: bytes) -> bytes:
    return commitments.derive_salt(owner.identity.kit_key, nonce, kind, *about)


def _hidden(owner: Owner, nonce: bytes, keys: Sequence[bytes]) -> list[bytes]:
    return [commitments.commit_key(_salt(owner, nonce, "key", key), key) for key in keys]


def _hidden_model(owner: Owner, nonce: bytes, digest: bytes) -> bytes:
    return commitments.commit_model(_salt(owner, nonce, "model"), owner.identity.public_key, digest)


def _is_of(owner: Owner, old: Publish, keys: Sequence[bytes], kits: Sequence[OwnerKit]) -> bool:
    return (
        old.signer == owner.identity.public_key
        and old.keys_count == len(keys)
        and old.keys_root == commitments.keys_root(_hidden(owner, old.nonce, keys))
        and old.model == _hidden_model(owner, old.nonce, _model(kits))
    )
