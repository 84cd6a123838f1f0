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
from mtlsign.claims.blob_store import MAX_MODEL, BlobStore, read_model_bytes
from mtlsign.claims.bundle import write_bundle
from mtlsign.claims.judging.council import MemberRound, run_member_round
from mtlsign.claims.judging.judge import ClaimVerifier, DetectorClaimVerifier
from mtlsign.claims.judging.lineage import DisputeResult, resolve_dispute
from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.tls import Tls
from mtlsign.claims.ledger.view import LedgerView, read_ledger
from mtlsign.claims.model_card import insert_block, provenance_block
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
from mtlsign.watermark.keys.sealing import EncryptionSecret

if TYPE_CHECKING:
    from mtlsign.watermark.kit import OwnerKit


def open_ledger_from_settings(settings: LedgerSettings, *, create: bool = False) -> Ledger:
    """The ledger that the settings name. Raises LedgerError also when its origin is not the one they name."""
    ledger = open_ledger(
        settings.ledger, tls=Tls(settings.etcd_ca, settings.etcd_cert, settings.etcd_key), create=create
    )
    try:
        if settings.origin is not None and ledger.origin().hex() != settings.origin:
            raise LedgerError(
                f"is not the one that you named: this ledger's is {ledger.origin().hex()}; use the right one",
                field="origin",
            )
    except BaseException:
        ledger.close()
        raise
    return ledger


def blob_store_from(settings: LedgerSettings) -> BlobStore:
    """The archive that the settings name."""
    return BlobStore.at(settings.archive, ledger=settings.ledger, endpoint=settings.endpoint)


def owner_from(settings: LedgerSettings, ledger: Ledger) -> owner.Owner:
    """The owner identity at the ledger."""
    identity, _, _ = load_or_create_identity(settings.owner, settings.passphrase_file)
    return owner.Owner(identity, ledger, settings.memory)


def load_kits(settings: KitSettings, identity: Identity) -> list[OwnerKit]:
    """The kits that the settings name, opened."""
    from mtlsign.watermark.kit import read_kit

    if settings.kit_passphrase_file is not None:
        secret = EncryptionSecret.from_passphrase(read_passphrase(settings.kit_passphrase_file))
    else:
        secret = EncryptionSecret.from_kit_key(identity.kit_key)
    places = [place.strip() for place in settings.kit.split(",") if place.strip()]
    return [read_kit(place, secret, endpoint=settings.endpoint) for place in places]


def factories_of(factory: str | None) -> Mapping[str, object] | None:
    """Architectures beyond the allow-list that this operator trusts."""
    if not factory:
        return None
    from mtlsign.models.factories import load_factory

    return {factory: load_factory(factory)}


def checkpoint_json(ledger: Ledger, view: LedgerView) -> dict[str, Any]:
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
        "note": signed_note(ledger, view).decode(),
        "current": fresh.current,
        "freshness": fresh.note,
        "remarks": list(view.remarks),
    }


def signed_note(ledger: Ledger, view: LedgerView) -> bytes:
    """The newest head that counts as a signed note (or the bare tree), with the council's lines."""
    head = view.heads[-1].head if view.heads else ledger.head()
    council = view.council(head.size)
    stored = [line for at, line in ledger.cosignatures(view.origin) if at == head]
    lines = [checkpoints.earliest_valid_line(head, stored, member) for member in council.members]
    return checkpoints.encode_signed_note(head, [line for line in lines if line is not None])


def publish(settings: PublishSettings) -> dict[str, Any]:
    """Commit to a marked model before it leaves. An SQLite ledger that is not there is founded, with us
    alone.

    Raises:
        ClaimError: the model is not the kit's, or is out already and `already_public` was not given.
    """
    from mtlsign.storage.model_folder import read_model

    new = (
        settings.ledger.startswith("sqlite:///")
        and not Path(settings.ledger.removeprefix("sqlite:///")).exists()
    )
    model = read_model(settings.model, endpoint=settings.endpoint)
    identity, _, _ = load_or_create_identity(settings.owner, settings.passphrase_file)
    kits = load_kits(settings, identity)
    if any(kit.info.get("model_digest") != model.digest for kit in kits):
        raise ClaimError(f"is {model.digest}, which is not the kit's; give the marked model", field="model")
    if not settings.already_public and exposure.is_publicly_readable(
        settings.model, endpoint=settings.endpoint
    ):
        raise ClaimError(
            "can be read by anybody where it lies, so a commitment now would come too late; move it, or say "
            "--already-public",
            field="model",
        )
    with open_ledger_from_settings(settings, create=True) as ledger:
        us = owner.Owner(identity, ledger, settings.memory)
        if ledger.size() == 0:
            if not settings.ledger.startswith("sqlite:///"):
                raise LedgerError(
                    "is not founded yet; jobs/ledger.py found names its council", field="ledger"
                )
            owner.create_ledger(us, [identity.public_key])
        seen = owner.already_disclosed(us, kits)
        if seen is not None and not settings.already_public:
            raise ClaimError(
                f"was seen already: entry {seen} of the ledger names it; --already-public publishes anyway",
                field="model",
            )
        entry, said = owner.publish(us, kits, licence=settings.licence, recipient=settings.recipient)
        view = read_ledger(ledger)
        done = {
            "index": entry.index,
            "id": entry.leaf.hex(),
            "founded": new,
            "keys": said.keys_count,
            "model_digest": model.digest,
            "time": view.time(entry.index),
            "counted": view.time(entry.index) is not None,
            "self_attested": view.self_attested(entry.index, identity.public_key),
            "head": checkpoint_json(ledger, view),
        }
    if settings.card is not None:
        write_card(settings.card, provenance_block(done))
    return done


def write_card(path: Path, block: str) -> None:
    """Put a block into a model card, which is made if it is not there."""
    try:
        path.write_text(insert_block(path.read_text("utf-8") if path.exists() else "", block), "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClaimError(f"{path}: {error}; name a text file that you can write", field="card") from None


def claim(settings: ClaimSettings) -> dict[str, Any]:
    """Register a suspect and open one key against it; with `bundle` also one file for an offline check.

    Raises:
        ClaimError: no key of the kits is in the suspect, and `anyway` was not given: nothing was opened.
    """
    suspect = read_model_bytes(settings.model, endpoint=settings.endpoint)
    archive = blob_store_from(settings)
    with open_ledger_from_settings(settings) as ledger:
        us = owner_from(settings, ledger)
        kits = load_kits(settings, us.identity)
        if not settings.anyway:
            _require_key_present(kits, suspect, settings.factory, us.view().councils[-1][1].bits)
        marked = _marked(settings, kits, archive)
        entry, said = owner.claim(
            us, kits, archive, suspect, marked=marked, name=settings.name, wait=settings.wait
        )
        view = read_ledger(ledger)
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
            "head": checkpoint_json(ledger, view),
        }
        if settings.bundle is not None:
            write_bundle(settings.bundle, ledger, view, entry, archive)
            result["bundle"] = str(settings.bundle)
        return result


def _require_key_present(kits: Sequence[OwnerKit], suspect: bytes, factory: str | None, bits: int) -> None:
    """A claim spends a key, so look first, as any member will.

    Raises:
        ClaimError: no kit's key is in the model. ModelError: it cannot be read at all.
    """
    from mtlsign.storage.safetensors_io import parse_safetensors
    from mtlsign.watermark.kit import detector_for_kit
    from mtlsign.watermark.verification.detector import verify

    tensors = parse_safetensors(suspect, max_bytes=MAX_MODEL)
    verdicts = [verify(tensors, detector_for_kit(kit, factory), bits=float(bits)) for kit in kits]
    if not any(found.status in ("accepted", "needs_commitment") for found in verdicts):
        best = max(verdicts, key=lambda found: found.evidence_bits)
        raise ClaimError(
            f"is not worth a key, which a claim spends: {best.summary().rstrip('.')}; no key was opened "
            "(--anyway claims nevertheless)",
            field="model",
        )


def _marked(settings: ClaimSettings, kits: Sequence[OwnerKit], archive: BlobStore) -> bytes | None:
    """The marked model's bytes: as given, else from `models/<digest>` of the storage in which the kit
    lies.
    """
    from mtlsign.storage.model_folder import MODELS

    if settings.marked is not None:
        return read_model_bytes(settings.marked, endpoint=settings.endpoint)
    digest = str(kits[0].info.get("model_digest"))
    with suppress(ValueError, ArtifactError):
        return archive.get(bytes.fromhex(digest), MAX_MODEL)
    first = settings.kit.split(",")[0].strip()
    store, mark, query = first.partition("?") if first.startswith("s3:") else (first, "", "")
    store = store.rstrip("/").rpartition("/")[0].rpartition("/")[0]
    with suppress(ArtifactError):
        return read_model_bytes(f"{store or '.'}/{MODELS}/{digest}{mark}{query}", endpoint=settings.endpoint)
    return None


def council(
    settings: CouncilSettings,
    *,
    judge: ClaimVerifier | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """One member: a round, or rounds for ever; `show` gets each round's result as it ends.

    Raises:
        LedgerError: in the one round that `once` asks for. Otherwise a round that fails (no majority of the
            servers, a ledger that was rewritten) says so in its result, signs nothing, and is tried again.
    """
    passphrase = read_passphrase(settings.passphrase_file) if settings.passphrase_file else None
    try:
        identity = Identity.load(settings.identity, passphrase)
    except KeyMaterialError as error:  # a member calls that file --identity
        raise KeyMaterialError(error.detail, field="identity") from None
    archive = blob_store_from(settings)
    judge = judge or DetectorClaimVerifier(factories_of(settings.factory))
    while True:
        try:
            with open_ledger_from_settings(settings) as ledger:
                done = run_member_round(identity, ledger, archive, judge, memory=settings.memory)
                result = _round_json(identity, done) | {"head": checkpoint_json(ledger, read_ledger(ledger))}
        except (LedgerError, StorageError) as error:
            if settings.once:
                raise
            result = _round_json(identity, None) | {"head": None, "failed": str(error)}
        if show is not None:
            show(result)
        if settings.once:
            return result
        time.sleep(settings.every)


def _round_json(identity: Identity, done: MemberRound | None) -> dict[str, Any]:
    if done is None:
        return {"member": identity.public_key.hex(), "votes": [], "cosigned": [], "remarks": []}
    return {
        "member": identity.public_key.hex(),
        "votes": [asdict(finding) | {"claim": claim, "entry": at} for claim, finding, at in done.votes],
        "cosigned": list(dict.fromkeys(done.before.cosigned + done.after.cosigned)),
        "remarks": list(dict.fromkeys(done.before.remarks + done.after.remarks)),
    }


def resolve_dispute_job(settings: DisputeSettings, *, judge: ClaimVerifier | None = None) -> DisputeResult:
    """Matrix, edges and standings of the named claims, by our own verification and the ledger."""
    ids = [name.strip() for name in settings.claims.split(",") if name.strip()]
    if not ids:
        raise ClaimError("names none; give ids or numbers, see jobs/ledger.py list", field="claims")
    with open_ledger_from_settings(settings) as ledger:
        judge = judge or DetectorClaimVerifier(factories_of(settings.factory))
        return resolve_dispute(read_ledger(ledger), ids, blob_store_from(settings), judge, bits=settings.bits)
