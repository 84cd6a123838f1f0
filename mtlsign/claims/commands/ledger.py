"""What `jobs/ledger.py` does: found a ledger, show and check it, change its council, exhibit, pack a
bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtlsign.claims import merkle, owner
from mtlsign.claims.blob_store import read_model_bytes
from mtlsign.claims.bundle import write_bundle
from mtlsign.claims.commands.owner import (
    blob_store_from,
    checkpoint_json,
    open_ledger_from_settings,
    owner_from,
    signed_note,
)
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.checkpoints import cosigner_times, parse_signed_note
from mtlsign.claims.ledger.rebuild import verify_stored_tree
from mtlsign.claims.ledger.view import LedgerView, read_ledger
from mtlsign.claims.statements import envelope
from mtlsign.claims.statements.parsing import open_statement, parse, sign_statement
from mtlsign.claims.statements.types import Membership, Ref
from mtlsign.config.claims import LedgerJobSettings
from mtlsign.errors import ClaimError, LedgerError, SettingsError


def found(settings: LedgerJobSettings) -> dict[str, Any]:
    """Make an empty ledger: its first entry names the council."""
    with open_ledger_from_settings(settings, create=True) as ledger:
        us = owner_from(settings, ledger)
        ref = owner.create_ledger(
            us,
            _members(settings) or [us.identity.public_key],
            threshold=settings.threshold,
            bits=settings.bits,
            window=settings.window,
        )
        return {"origin": ref.leaf.hex(), "head": checkpoint_json(ledger, read_ledger(ledger))}


def head(settings: LedgerJobSettings) -> dict[str, Any]:
    """The newest head that counts; `out` gets it as a signed note, to be pinned."""
    with open_ledger_from_settings(settings) as ledger:
        view = read_ledger(ledger)
        if settings.out is not None:
            _write(settings.out, signed_note(ledger, view))
        return checkpoint_json(ledger, view)


def prove(settings: LedgerJobSettings) -> dict[str, Any]:
    """One entry with its inclusion path in a tree (default: the newest head that counts)."""
    if settings.index is None:
        raise SettingsError("is required: the entry to prove", field="index")
    with open_ledger_from_settings(settings) as ledger:
        view = read_ledger(ledger)
        newest = view.heads[-1].head.size if view.heads else ledger.size()
        size = settings.size or max(newest, settings.index + 1)
        tree, data = ledger.head(size), ledger.get(settings.index)
        path = ledger.prove(settings.index, size)
        if not merkle.verify_inclusion(merkle.leaf_hash(data), settings.index, size, path, tree.root):
            raise LedgerError("has a stored tree that does not fit its entries; check it", field="ledger")
        return {
            "index": settings.index,
            "leaf": merkle.leaf_hash(data).hex(),
            "envelope": data.decode("utf-8", "replace"),
            "size": size,
            "root": tree.root.hex(),
            "path": [step.hex() for step in path],
            "time": view.time(settings.index),
            "counted": view.time(settings.index) is not None,
        }


def check_all(settings: LedgerJobSettings) -> dict[str, Any]:
    """Recompute everything; with `head` also that the ledger still contains a head that one kept.

    Raises:
        LedgerError: truncated, forked, rewritten or damaged.
    """
    with open_ledger_from_settings(settings) as ledger:
        tree, view = verify_stored_tree(ledger), read_ledger(ledger)
        if settings.head is not None:
            _contains(ledger, view, settings.head)
        return {
            "size": tree.size,
            "root": tree.root.hex(),
            "heads": len(view.heads),
            "meaningless": [
                {"index": e.index, "problem": e.problem} for e in view.entries.values() if e.statement is None
            ],
            "remarks": list(view.remarks),
            "kept_head": settings.head is not None,
            "freshness": ledger.freshness().note,
        }


def _contains(ledger: Ledger, view: LedgerView, path: Path) -> None:
    kept, lines = parse_signed_note(_read(path))
    if kept.origin != view.origin:
        raise LedgerError("is another one than that of the head you kept", field="ledger")
    if kept.size > ledger.size() or ledger.head(kept.size).root != kept.root:
        who = (
            ", ".join(m.hex()[:16] for m in cosigner_times(kept, lines, view.council(kept.size).members))
            or "nobody"
        )
        raise LedgerError(
            f"does not contain the tree of {kept.size} entries that you kept, co-signed by {who}: it was "
            "truncated, forked or rewritten",
            field="ledger",
        )


def list_all(settings: LedgerJobSettings) -> dict[str, Any]:
    """All entries: number, hash, kind, author, time."""
    with open_ledger_from_settings(settings) as ledger:
        view = read_ledger(ledger)
        return {
            "entries": [
                {
                    "index": entry.index,
                    "id": entry.leaf.hex(),
                    "kind": entry.statement.kind if entry.statement else None,
                    "signer": entry.statement.signer.hex() if entry.statement else None,
                    "time": view.time(entry.index),
                    "says": entry.statement.time if entry.statement else None,
                    "problem": entry.problem,
                }
                for entry in view.entries.values()
            ],
            "freshness": ledger.freshness().note,
        }


def members(settings: LedgerJobSettings) -> dict[str, Any]:
    """Propose a new council (`members`), or sign a proposal (`statement`); append it once enough have
    signed.
    """
    with open_ledger_from_settings(settings) as ledger:
        us, view = owner_from(settings, ledger), read_ledger(ledger)
        index, council = view.councils[-1]
        if settings.statement is not None:
            data = _read(settings.statement)
            said = parse(envelope.open_envelope(data).payload)
            if not isinstance(said, Membership):
                raise ClaimError("is no membership; give a proposed one", field="statement")
            data = envelope.merge(data, envelope.sign(said.payload(), us.identity))
        else:
            named = _members(settings)
            if not named:
                raise SettingsError("is required: who shall be on the council", field="members")
            previous = Ref(index, view.entries[index].leaf)
            data = sign_statement(
                Membership(
                    signer=us.identity.public_key, ledger=view.origin, time=us.now(), members=tuple(named),
                    threshold=settings.threshold or len(named) // 2 + 1, bits=settings.bits, window=settings.window,
                    previous=previous,
                ),
                us.identity,
            )  # fmt: skip
        signed = set(open_statement(data)[1]) & set(council.members)
        enough = len(signed) >= council.threshold
        result: dict[str, Any] = {"signed": len(signed), "threshold": council.threshold, "appended": enough}
        if enough:
            result["index"] = ledger.append(data)
        else:
            if settings.out is None:
                raise SettingsError(
                    "is required: where the proposal goes, to be signed by others", field="out"
                )
            _write(settings.out, data)
        return result


def exhibit(settings: LedgerJobSettings) -> dict[str, Any]:
    """Answer a claim with an earlier-stamped model of ours."""
    if settings.claim is None or settings.model is None:
        raise SettingsError("is required, and --model", field="claim")
    with open_ledger_from_settings(settings) as ledger:
        us = owner_from(settings, ledger)
        ref = owner.exhibit(
            us,
            blob_store_from(settings),
            settings.claim,
            read_model_bytes(settings.model, endpoint=settings.endpoint),
        )
        return {"index": ref.index, "id": ref.leaf.hex()}


def bundle(settings: LedgerJobSettings) -> dict[str, Any]:
    """Pack a claim with all its proofs into one file."""
    if settings.claim is None or settings.out is None:
        raise SettingsError("is required, and --out", field="claim")
    with open_ledger_from_settings(settings) as ledger:
        view = read_ledger(ledger)
        entry, _ = find_claim(view, settings.claim)
        against = write_bundle(settings.out, ledger, view, entry, blob_store_from(settings))
        return {"bundle": str(settings.out), "size": against.size, "root": against.root.hex()}


ACTIONS: dict[str, Callable[[LedgerJobSettings], dict[str, Any]]] = {
    "found": found,
    "head": head,
    "prove": prove,
    "check": check_all,
    "list": list_all,
    "members": members,
    "exhibit": exhibit,
    "bundle": bundle,
}


def _members(settings: LedgerJobSettings) -> list[bytes]:
    """Public keys from hexadecimal digits or from identity files (only their public half is read)."""
    named = []
    for one in (part.strip() for part in (settings.members or "").split(",")):
        if not one:
            continue
        text = one if len(one) == 64 and not Path(one).exists() else _public_key(Path(one))
        try:
            named.append(bytes.fromhex(text))
        except ValueError:
            raise SettingsError(
                f"{one[:80]!r} is no public key; give 64 hex digits", field="members"
            ) from None
    return sorted(set(named))


def _public_key(path: Path) -> str:
    from mtlsign.storage.strict_json import parse_strict_json

    found = parse_strict_json(_read(path), limit=64 * 1024, where="members")
    return str(found.get("public_key", "")) if isinstance(found, dict) else ""


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(256 * 1024)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; give a file you can read", field="file") from None


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; name another file", field="out") from None
