"""What the jobs around the ledger do: settings in, a JSON-ready result out. A notebook may call each of
them. What needs PyTorch is imported where it is needed: a look at a ledger should not take seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlsign.claims import exposure, owner
from mtlsign.claims.blob_store import MAX_MODEL, Archive, read_bytes
from mtlsign.claims.bundle import write_bundle
from mtlsign.claims.judging.council import Round, take_part
from mtlsign.claims.judging.judge import AlgorithmOne, Judge
from mtlsign.claims.judging.lineage import Dispute, dispute
from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.tls import Tls
from mtlsign.claims.ledger.view import View, read_view
from mtlsign.claims.model_card import insert, publication_block
from mtlsign.config.claims import (
    ClaimSettings,
    CouncilSettings,
    DisputeSettings,
    KitSettings,
    LedgerSettings,
    PublishSettings,
)
from mtlsign.errors import ArtifactError, ClaimError, KeyMaterialError, LedgerError, StorageError
from mtlsign.watermark.keys.identity import Identity, load_or_create_identity, read_passphrase
from mtlsign.watermark.keys.sealing import Secret

if TYPE_CHECKING:
    from mtlsign.watermark.kit import Kit


def open_from(s: LedgerSettings, *, create: bool = False) -> Ledger:
    """The ledger that the settings name. Raises LedgerError also when its origin is not the one they name."""
    ledger = open_ledger(s.ledger, tls=Tls(s.etcd_ca, s.etcd_cert, s.etcd_key), create=create)
    try:
        if s.origin is not None and ledger.origin().hex() != s.origin:
            raise LedgerError(
                f"is not the one that you named: this ledger's is {ledger.origin().hex()}; use the right one",
                field="origin",
            )
    except BaseException:
        ledger.close()
        raise
    return ledger


def archive_of(s: LedgerSettings) -> Archive:
    """The archive that the settings name."""
    return Archive.at(s.archive, ledger=s.ledger, endpoint=s.endpoint)


def owner_of(s: LedgerSettings, ledger: Ledger) -> owner.Owner:
    """The owner identity at the ledger."""
    identity, _, _ = load_or_create_identity(s.owner, s.passphrase_file)
    return owner.Owner(identity, ledger, s.memory)


def kits_of(s: KitSettings, identity: Identity) -> list[Kit]:
    """The kits that the settings name, opened."""
    from mtlsign.watermark.kit import read_kit

    if s.kit_passphrase_file is not None:
        secret = Secret.from_passphrase(read_passphrase(s.kit_passphrase_file))
    else:
        secret = Secret.from_kit_key(identity.kit_key)
    places = [place.strip() for place in s.kit.split(",") if place.strip()]
    return [read_kit(place, secret, endpoint=s.endpoint) for place in places]


def factories_of(factory: str | None) -> Mapping[str, object] | None:
    """Architectures beyond the allow-list that this operator trusts."""
    if not factory:
        return None
    from mtlsign.models.factories import load_factory

    return {factory: load_factory(factory)}


def head_json(ledger: Ledger, view: View) -> dict[str, Any]:
    """The newest head that counts, or, while there is none, the tree as it is."""
    newest = view.heads[-1] if view.heads else None
    head = newest.head if newest else ledger.head()
    fresh = ledger.freshness()
    return {
        "origin": head.origin.hex(),
        "size": head.size,
        "root": head.root.hex(),
        "counted": newest is not None,
        "time": newest.time if newest else None,
        "cosigned": sorted(member.hex() for member in newest.times) if newest else [],
        "entries": len(view.entries),
        "note": note_of(ledger, view).decode(),
        "current": fresh.current,
        "freshness": fresh.note,
        "remarks": list(view.remarks),
    }


def note_of(ledger: Ledger, view: View) -> bytes:
    """The newest head that counts as a signed note (or the bare tree), with the council's lines."""
    head = view.heads[-1].head if view.heads else ledger.head()
    council = view.council(head.size)
    stored = [line for at, line in ledger.cosignatures(view.origin) if at == head]
    lines = [checkpoints.first_of(head, stored, member) for member in council.members]
    return checkpoints.note(head, [line for line in lines if line is not None])


def publish(s: PublishSettings) -> dict[str, Any]:
    """Commit to a marked model before it leaves. An SQLite ledger that is not there is founded, with us
    alone.

    Raises:
        ClaimError: the model is not the kit's, or is out already and `already_public` was not given.
    """
    from mtlsign.storage.model_folder import read_model

    new = s.ledger.startswith("sqlite:///") and not Path(s.ledger.removeprefix("sqlite:///")).exists()
    model = read_model(s.model, endpoint=s.endpoint)
    identity, _, _ = load_or_create_identity(s.owner, s.passphrase_file)
    kits = kits_of(s, identity)
    if any(kit.info.get("model_digest") != model.digest for kit in kits):
        raise ClaimError(f"is {model.digest}, which is not the kit's; give the marked model", field="model")
    if not s.already_public and exposure.is_public(s.model, endpoint=s.endpoint):
        raise ClaimError(
            "can be read by anybody where it lies, so a commitment now would come too late; move it, or say "
            "--already-public",
            field="model",
        )
    with open_from(s, create=True) as ledger:
        us = owner.Owner(identity, ledger, s.memory)
        if ledger.size() == 0:
            if not s.ledger.startswith("sqlite:///"):
                raise LedgerError(
                    "is not founded yet; jobs/ledger.py found names its council", field="ledger"
                )
            owner.found(us, [identity.public_key])
        seen = owner.already_out(us, kits)
        if seen is not None and not s.already_public:
            raise ClaimError(
                f"was seen already: entry {seen} of the ledger names it; --already-public publishes anyway",
                field="model",
            )
        entry, said = owner.publish(us, kits, licence=s.licence, recipient=s.recipient)
        view = read_view(ledger)
        done = {
            "index": entry.index,
            "id": entry.leaf.hex(),
            "founded": new,
            "keys": said.keys_count,
            "model_digest": model.digest,
            "time": view.time(entry.index),
            "counted": view.time(entry.index) is not None,
            "self_attested": view.self_attested(entry.index, identity.public_key),
            "head": head_json(ledger, view),
        }
    if s.card is not None:
        write_card(s.card, publication_block(done))
    return done


def write_card(path: Path, block: str) -> None:
    """Put a block into a model card, which is made if it is not there."""
    try:
        path.write_text(insert(path.read_text("utf-8") if path.exists() else "", block), "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClaimError(f"{path}: {error}; name a text file that you can write", field="card") from None


def claim(s: ClaimSettings) -> dict[str, Any]:
    """Register a suspect and open one key against it; with `bundle` also one file for an offline check.

    Raises:
        ClaimError: no key of the kits is in the suspect, and `anyway` was not given: nothing was opened.
    """
    suspect = read_bytes(s.model, endpoint=s.endpoint)
    archive = archive_of(s)
    with open_from(s) as ledger:
        us = owner_of(s, ledger)
        kits = kits_of(s, us.identity)
        if not s.anyway:
            _worth_opening(kits, suspect, s.factory, us.view().councils[-1][1].bits)
        marked = _marked(s, kits, archive)
        entry, said = owner.claim(us, kits, archive, suspect, marked=marked, name=s.name, wait=s.wait)
        view = read_view(ledger)
        result = {
            "claim": entry.leaf.hex(),
            "index": entry.index,
            "publication": said.publish.index,
            "registration": said.register.index,
            "registration_counted": view.time(said.register.index) is not None,
            "key": said.key_index,
            "suspect": said.suspect.hex(),
            "marked_archived": archive.has(said.model),
            "counted": view.time(entry.index) is not None,
            "head": head_json(ledger, view),
        }
        if s.bundle is not None:
            write_bundle(s.bundle, ledger, view, entry, archive)
            result["bundle"] = str(s.bundle)
        return result


def _worth_opening(kits: Sequence[Kit], suspect: bytes, factory: str | None, bits: int) -> None:
    """A claim spends a key, so look first, as any member will.

    Raises:
        ClaimError: no kit's key is in the model. ModelError: it cannot be read at all.
    """
    from mtlsign.storage.safetensors_io import read_tensors
    from mtlsign.watermark.kit import probe_of
    from mtlsign.watermark.verification.detector import verify

    tensors = read_tensors(suspect, max_bytes=MAX_MODEL)
    verdicts = [verify(tensors, probe_of(kit, factory), bits=float(bits)) for kit in kits]
    if not any(found.status in ("accepted", "needs_commitment") for found in verdicts):
        best = max(verdicts, key=lambda found: found.evidence_bits)
        raise ClaimError(
            f"is not worth a key, which a claim spends: {best.sentence().rstrip('.')}; no key was opened "
            "(--anyway claims nevertheless)",
            field="model",
        )


def _marked(s: ClaimSettings, kits: Sequence[Kit], archive: Archive) -> bytes | None:
    """The marked model's bytes: as given, else from `models/<digest>` of the storage in which the kit
    lies.
    """
    from mtlsign.storage.model_folder import MODELS

    if s.marked is not None:
        return read_bytes(s.marked, endpoint=s.endpoint)
    digest = str(kits[0].info.get("model_digest"))
    with suppress(ValueError, ArtifactError):
        return archive.get(bytes.fromhex(digest), MAX_MODEL)
    first = s.kit.split(",")[0].strip()
    store, mark, query = first.partition("?") if first.startswith("s3:") else (first, "", "")
    store = store.rstrip("/").rpartition("/")[0].rpartition("/")[0]
    with suppress(ArtifactError):
        return read_bytes(f"{store or '.'}/{MODELS}/{digest}{mark}{query}", endpoint=s.endpoint)
    return None


def council(
    s: CouncilSettings, *, judge: Judge | None = None, show: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """One member: a round, or rounds for ever; `show` gets each round's result as it ends.

    Raises:
        LedgerError: in the one round that `once` asks for. Otherwise a round that fails (no majority of the
            servers, a ledger that was rewritten) says so in its result, signs nothing, and is tried again.
    """
    passphrase = read_passphrase(s.passphrase_file) if s.passphrase_file else None
    try:
        identity = Identity.load(s.identity, passphrase)
    except KeyMaterialError as error:  # a member calls that file --identity
        raise KeyMaterialError(error.detail, field="identity") from None
    archive = archive_of(s)
    judge = judge or AlgorithmOne(factories_of(s.factory))
    while True:
        try:
            with open_from(s) as ledger:
                done = take_part(identity, ledger, archive, judge, memory=s.memory)
                result = _round_json(identity, done) | {"head": head_json(ledger, read_view(ledger))}
        except (LedgerError, StorageError) as error:
            if s.once:
                raise
            result = _round_json(identity, None) | {"head": None, "failed": str(error)}
        if show is not None:
            show(result)
        if s.once:
            return result
        time.sleep(s.every)


def _round_json(identity: Identity, done: Round | None) -> dict[str, Any]:
    if done is None:
        return {"member": identity.public_key.hex(), "votes": [], "cosigned": [], "remarks": []}
    return {
        "member": identity.public_key.hex(),
        "votes": [asdict(finding) | {"claim": claim, "entry": at} for claim, finding, at in done.votes],
        "cosigned": list(dict.fromkeys(done.before.cosigned + done.after.cosigned)),
        "remarks": list(dict.fromkeys(done.before.remarks + done.after.remarks)),
    }


def settle(s: DisputeSettings, *, judge: Judge | None = None) -> Dispute:
    """Matrix, edges and standings of the named claims, by our own verification and the ledger."""
    ids = [name.strip() for name in s.claims.split(",") if name.strip()]
    if not ids:
        raise ClaimError("names none; give ids or numbers, see jobs/ledger.py list", field="claims")
    with open_from(s) as ledger:
        judge = judge or AlgorithmOne(factories_of(s.factory))
        return dispute(read_view(ledger), ids, archive_of(s), judge, bits=s.bits)
