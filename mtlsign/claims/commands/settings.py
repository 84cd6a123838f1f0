"""Objects that the claim jobs open from their settings: ledger, archive, owner, kits and architectures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlsign.claims import owner
from mtlsign.claims.blob_store import BlobStore
from mtlsign.claims.judging.isolated import IsolatedClaimVerifier
from mtlsign.claims.judging.judge import DetectorClaimVerifier
from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.open import open_ledger, require_known_scheme
from mtlsign.claims.ledger.tls import Tls
from mtlsign.claims.ledger.view import LedgerView
from mtlsign.claims.model_card import insert_block
from mtlsign.config.claims import KitSettings, LedgerSettings
from mtlsign.errors import ClaimError, LedgerError
from mtlsign.watermark.keys.identity import (
    Identity,
    load_identity,
    load_or_create_identity,
    read_passphrase,
)
from mtlsign.watermark.keys.sealing import EncryptionSecret

if TYPE_CHECKING:
    from mtlsign.watermark.kit import OwnerKit


def open_ledger_from_settings(settings: LedgerSettings, *, create: bool = False) -> Ledger:
    """Open the ledger of the settings. Raises LedgerError also if its origin differs from the settings."""
    ledger = open_ledger(
        settings.ledger, tls=Tls(settings.etcd_ca, settings.etcd_cert, settings.etcd_key), create=create
    )
    try:
        if settings.origin is not None and ledger.origin().hex() != settings.origin:
            raise LedgerError(
                f"This ledger has the origin {ledger.origin().hex()}. Pass the ledger with the given origin.",
                field="origin",
            )
    except BaseException:
        ledger.close()
        raise
    return ledger


def blob_store_from(settings: LedgerSettings) -> BlobStore:
    """Open the archive of the settings. Raises LedgerError if the ledger's URI has no known scheme."""
    require_known_scheme(settings.ledger)  # otherwise a path without scheme is reported as a lack of archives
    return BlobStore.from_locations(settings.archive, ledger=settings.ledger, endpoint=settings.endpoint)


def owner_from(settings: LedgerSettings, ledger: Ledger, *, create: bool = False) -> owner.Owner:
    """Return the owner identity of the settings at the ledger; `create` a missing one."""
    if create:
        identity, _, _ = load_or_create_identity(settings.owner, settings.passphrase_file)
    else:
        identity, _ = load_identity(settings.owner, settings.passphrase_file)
    return owner.Owner(identity, ledger, settings.witness_state)


def load_kits(settings: KitSettings, identity: Identity) -> list[OwnerKit]:
    """Read and decrypt the kits of the settings."""
    from mtlsign.watermark.kit import read_kit, require_kit_owner

    if settings.kit_passphrase_file is not None:
        secret = EncryptionSecret.from_passphrase(read_passphrase(settings.kit_passphrase_file))
    else:
        secret = EncryptionSecret.from_kit_key(identity.kit_key)
        for location in settings.kit:
            require_kit_owner(location, identity.public_key, endpoint=settings.endpoint)
    return [read_kit(location, secret, endpoint=settings.endpoint) for location in settings.kit]


@contextmanager
def claim_verifier(trusted_factory: str | None) -> Iterator[IsolatedClaimVerifier | DetectorClaimVerifier]:
    """Provide the verifier of untrusted claims: a child process with limits, which ends with the block."""
    verifier = IsolatedClaimVerifier(trusted_factory)
    try:
        yield verifier
    finally:
        verifier.close()


def checkpoint_json(ledger: Ledger, view: LedgerView) -> dict[str, Any]:
    """Return the newest confirmed checkpoint, or the current tree while there is none, as JSON values."""
    newest = view.confirmed[-1] if view.confirmed else None
    checkpoint = newest.checkpoint if newest else ledger.checkpoint()
    consistency = ledger.staleness()
    return {
        "origin": checkpoint.origin.hex(),
        "size": checkpoint.size,
        "root": checkpoint.root.hex(),
        "counted": newest is not None,
        "time": newest.time if newest else None,
        "cosigned": sorted(member.hex() for member in newest.times) if newest else [],
        "entries": len(view.entries),
        "note": signed_note(ledger, view).decode(),
        "current": consistency.current,
        "freshness": consistency.note,
        "remarks": list(view.warnings),
    }


def signed_note(ledger: Ledger, view: LedgerView) -> bytes:
    """Return the newest confirmed checkpoint (or the current tree) as a signed note with members' lines."""
    checkpoint = view.confirmed[-1].checkpoint if view.confirmed else ledger.checkpoint()
    stored = [line for signed, line in ledger.cosignatures(view.origin) if signed == checkpoint]
    members = view.council(checkpoint.size).members
    lines = [checkpoints.earliest_valid_line(checkpoint, stored, member) for member in members]
    return checkpoints.encode_signed_note(checkpoint, [line for line in lines if line is not None])


def write_card(path: Path, block: str) -> None:
    """Insert a block into a model card. A missing card is created."""
    try:
        path.write_text(insert_block(path.read_text("utf-8") if path.exists() else "", block), "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClaimError(f"{path}: {error}. Pass a writable text file.", field="card") from None
