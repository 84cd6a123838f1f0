"""Functions behind `jobs/ledger.py`: create, show and check a ledger, change its council, exhibit, bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtlsign.claims import merkle, owner
from mtlsign.claims.blob_store import read_model_bytes
from mtlsign.claims.bundle import write_bundle
from mtlsign.claims.commands.settings import (
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
from mtlsign.storage.strict_json import parse_strict_json

UNPINNED = (
    "The ledger was not compared with a stored checkpoint, so entries at its end may be missing. Pass a "
    "checkpoint of a member with --head."
)


def create(settings: LedgerJobSettings) -> dict[str, Any]:
    """Create a ledger: its first entry names the council."""
    with open_ledger_from_settings(settings, create=True) as ledger:
        author = owner_from(settings, ledger, create=True)
        ref = owner.create_ledger(
            author,
            _members(settings) or [author.public_key],
            threshold=settings.threshold,
            bits=settings.min_evidence_bits,
            window=settings.voting_window,
        )
        return {"origin": ref.leaf.hex(), "head": checkpoint_json(ledger, read_ledger(ledger))}


def head(settings: LedgerJobSettings) -> dict[str, Any]:
    """Return the newest confirmed checkpoint; `output` receives it as a signed note for pinning."""
    with open_ledger_from_settings(settings) as ledger:
        view = read_ledger(ledger)
        if settings.output is not None:
            _write(settings.output, signed_note(ledger, view))
        return checkpoint_json(ledger, view)


def prove(settings: LedgerJobSettings) -> dict[str, Any]:
    """Return one entry with its inclusion path (default: in the tree of the newest confirmed checkpoint)."""
    if settings.index is None:
        raise SettingsError("The entry is not given. Pass --index.", field="index")
    with open_ledger_from_settings(settings) as ledger:
        view = read_ledger(ledger)
        newest_size = view.confirmed[-1].checkpoint.size if view.confirmed else ledger.size()
        size = settings.size or max(newest_size, settings.index + 1)
        checkpoint, data = ledger.checkpoint(size), ledger.get(settings.index)
        leaf, path = merkle.leaf_hash(data), ledger.prove(settings.index, size)
        if not merkle.verify_inclusion(leaf, settings.index, size, path, checkpoint.root):
            raise LedgerError(
                "The stored tree does not match the entries. Run jobs/ledger.py check.", field="ledger"
            )
        return {
            "index": settings.index,
            "leaf": leaf.hex(),
            "envelope": data.decode("utf-8", "replace"),
            "size": size,
            "root": checkpoint.root.hex(),
            "path": [step.hex() for step in path],
            "time": view.time(settings.index),
            "counted": view.time(settings.index) is not None,
        }


def check_all(settings: LedgerJobSettings) -> dict[str, Any]:
    """Recompute the ledger; with `head` also check that it contains the tree of that checkpoint.

    Raises:
        LedgerError: the ledger is truncated, forked, rewritten or damaged.
    """
    with open_ledger_from_settings(settings) as ledger:
        checkpoint, view = verify_stored_tree(ledger), read_ledger(ledger)
        if settings.head is not None:
            _require_contained(ledger, view, settings.head)
        return {
            "size": checkpoint.size,
            "root": checkpoint.root.hex(),
            "heads": len(view.confirmed),
            "meaningless": [
                {"index": entry.index, "problem": entry.problem}
                for entry in view.entries.values()
                if entry.statement is None
            ],
            "remarks": list(view.warnings),
            "kept_head": settings.head is not None,
            "caveat": "" if settings.head is not None else UNPINNED,
            "freshness": ledger.staleness().note,
        }


def _require_contained(ledger: Ledger, view: LedgerView, path: Path) -> None:
    checkpoint, lines = parse_signed_note(_read(path))
    size = checkpoint.size
    if checkpoint.origin != view.origin:
        raise LedgerError("The checkpoint belongs to another ledger. Pass the right ledger.", field="ledger")
    if size > ledger.size() or ledger.checkpoint(size).root != checkpoint.root:
        members = cosigner_times(checkpoint, lines, view.council(size).members)
        names = ", ".join(member.hex()[:16] for member in members) or "no member"
        raise LedgerError(
            f"The ledger does not contain the checkpoint's tree of {size} entries, co-signed by {names}: "
            "it was truncated, forked or rewritten. Ask the members.",
            field="ledger",
        )


def list_all(settings: LedgerJobSettings) -> dict[str, Any]:
    """Return all entries with number, hash, kind, author and time."""
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
                    "stated_time": entry.statement.time if entry.statement else None,
                    "problem": entry.problem,
                }
                for entry in view.entries.values()
            ],
            "freshness": ledger.staleness().note,
        }


def members(settings: LedgerJobSettings) -> dict[str, Any]:
    """Propose a new council or sign a proposal (`statement`), and append it once it has enough signatures."""
    with open_ledger_from_settings(settings) as ledger:
        author, view = owner_from(settings, ledger), read_ledger(ledger)
        data = _proposal(settings, author, view)
        current = view.councils[-1][1]
        signers = set(open_statement(data)[1]) & set(current.members)
        is_complete = len(signers) >= current.threshold
        result: dict[str, Any] = {
            "signed": len(signers), "threshold": current.threshold, "appended": is_complete,
        }  # fmt: skip
        if is_complete:
            result["index"] = ledger.append(data)
        else:
            if settings.output is None:
                raise SettingsError(
                    "The proposal needs further signatures. Pass --output for its file.", field="output"
                )
            _write(settings.output, data)
        return result


def _proposal(settings: LedgerJobSettings, author: owner.Owner, view: LedgerView) -> bytes:
    """Return the proposal of the settings with the author's signature."""
    if settings.statement is not None:
        data = _read(settings.statement)
        statement = parse(envelope.open_envelope(data).payload)
        if not isinstance(statement, Membership):
            raise ClaimError("The statement is not a membership. Pass a proposed one.", field="statement")
        return envelope.merge(data, envelope.sign(statement.payload(), author.identity))
    public_keys = _members(settings)
    if not public_keys:
        raise SettingsError("The new council is not given. Pass --members.", field="members")
    index, _ = view.councils[-1]
    proposed = Membership(
        signer=author.public_key,
        ledger=view.origin,
        time=author.now(),
        members=tuple(public_keys),
        threshold=settings.threshold or len(public_keys) // 2 + 1,
        bits=settings.min_evidence_bits,
        window=settings.voting_window,
        previous=Ref(index, view.entries[index].leaf),
    )
    return sign_statement(proposed, author.identity)


def exhibit(settings: LedgerJobSettings) -> dict[str, Any]:
    """Answer a claim with an own model that has an earlier timestamp."""
    if settings.claim is None or settings.model is None:
        raise SettingsError("Claim or model is not given. Pass --claim and --model.", field="claim")
    with open_ledger_from_settings(settings) as ledger:
        model = read_model_bytes(settings.model, endpoint=settings.endpoint)
        author, archive = owner_from(settings, ledger), blob_store_from(settings)
        ref = owner.exhibit(author, archive, settings.claim, model)
        return {"index": ref.index, "id": ref.leaf.hex()}


def bundle(settings: LedgerJobSettings) -> dict[str, Any]:
    """Write a claim with all its proofs into one file."""
    if settings.claim is None or settings.output is None:
        raise SettingsError("Claim or file is not given. Pass --claim and --output.", field="claim")
    with open_ledger_from_settings(settings) as ledger:
        view = read_ledger(ledger)
        entry, _ = find_claim(view, settings.claim)
        checkpoint = write_bundle(settings.output, ledger, view, entry, blob_store_from(settings))
        return {"bundle": str(settings.output), "size": checkpoint.size, "root": checkpoint.root.hex()}


ACTIONS: dict[str, Callable[[LedgerJobSettings], dict[str, Any]]] = {
    "create": create,
    "head": head,
    "prove": prove,
    "check": check_all,
    "list": list_all,
    "members": members,
    "exhibit": exhibit,
    "bundle": bundle,
}


def _members(settings: LedgerJobSettings) -> list[bytes]:
    """Return the public keys of the settings, in hexadecimal or from the public part of identity files."""
    public_keys = []
    for item in settings.members:
        text = item if len(item) == 64 and not Path(item).exists() else _public_key(Path(item))
        try:
            public_keys.append(bytes.fromhex(text))
        except ValueError:
            raise SettingsError(
                f"{item[:80]!r} is not a public key. Pass 64 hexadecimal digits.", field="members"
            ) from None
    return sorted(set(public_keys))


def _public_key(path: Path) -> str:
    fields = parse_strict_json(_read(path), limit=64 * 1024, where="members")
    return str(fields.get("public_key", "")) if isinstance(fields, dict) else ""


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(256 * 1024)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}. Pass a readable file.", field="file") from None


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}. Pass another file.", field="output") from None
