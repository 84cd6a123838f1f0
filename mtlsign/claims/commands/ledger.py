"""What `jobs/ledger.py` does: found a ledger, show and check it, change its council, exhibit, pack a
bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtlsign.claims import merkle, owner
from mtlsign.claims.blob_store import read_bytes
from mtlsign.claims.bundle import write_bundle
from mtlsign.claims.commands.owner import archive_of, head_json, note_of, open_from, owner_of
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.checkpoints import parse_note, times
from mtlsign.claims.ledger.rebuild import check
from mtlsign.claims.ledger.view import View, read_view
from mtlsign.claims.statements import envelope
from mtlsign.claims.statements.parsing import parse, seal, unseal
from mtlsign.claims.statements.types import Membership, Ref
from mtlsign.config.claims import LedgerJobSettings
from mtlsign.errors import ClaimError, LedgerError, SettingsError


def found(s: LedgerJobSettings) -> dict[str, Any]:
    """Make an empty ledger: its first entry names the council."""
    with open_from(s, create=True) as ledger:
        us = owner_of(s, ledger)
        ref = owner.found(
            us, _members(s) or [us.identity.public_key], threshold=s.threshold, bits=s.bits, window=s.window
        )
        return {"origin": ref.leaf.hex(), "head": head_json(ledger, read_view(ledger))}


def head(s: LedgerJobSettings) -> dict[str, Any]:
    """The newest head that counts; `out` gets it as a signed note, to be pinned."""
    with open_from(s) as ledger:
        view = read_view(ledger)
        if s.out is not None:
            _write(s.out, note_of(ledger, view))
        return head_json(ledger, view)


def prove(s: LedgerJobSettings) -> dict[str, Any]:
    """One entry with its inclusion path in a tree (default: the newest head that counts)."""
    if s.index is None:
        raise SettingsError("is required: the entry to prove", field="index")
    with open_from(s) as ledger:
        view = read_view(ledger)
        newest = view.heads[-1].head.size if view.heads else ledger.size()
        size = s.size or max(newest, s.index + 1)
        tree, data = ledger.head(size), ledger.get(s.index)
        path = ledger.prove(s.index, size)
        if not merkle.verify_inclusion(merkle.leaf_hash(data), s.index, size, path, tree.root):
            raise LedgerError("has a stored tree that does not fit its entries; check it", field="ledger")
        return {
            "index": s.index,
            "leaf": merkle.leaf_hash(data).hex(),
            "envelope": data.decode("utf-8", "replace"),
            "size": size,
            "root": tree.root.hex(),
            "path": [step.hex() for step in path],
            "time": view.time(s.index),
            "counted": view.time(s.index) is not None,
        }


def check_all(s: LedgerJobSettings) -> dict[str, Any]:
    """Recompute everything; with `head` also that the ledger still contains a head that one kept.

    Raises:
        LedgerError: truncated, forked, rewritten or damaged.
    """
    with open_from(s) as ledger:
        tree, view = check(ledger), read_view(ledger)
        if s.head is not None:
            _contains(ledger, view, s.head)
        return {
            "size": tree.size,
            "root": tree.root.hex(),
            "heads": len(view.heads),
            "meaningless": [
                {"index": e.index, "problem": e.problem} for e in view.entries.values() if e.statement is None
            ],
            "remarks": list(view.remarks),
            "kept_head": s.head is not None,
            "freshness": ledger.freshness().note,
        }


def _contains(ledger: Ledger, view: View, path: Path) -> None:
    kept, lines = parse_note(_read(path))
    if kept.origin != view.origin:
        raise LedgerError("is another one than that of the head you kept", field="ledger")
    if kept.size > ledger.size() or ledger.head(kept.size).root != kept.root:
        who = ", ".join(m.hex()[:16] for m in times(kept, lines, view.council(kept.size).members)) or "nobody"
        raise LedgerError(
            f"does not contain the tree of {kept.size} entries that you kept, co-signed by {who}: it was "
            "truncated, forked or rewritten",
            field="ledger",
        )


def list_all(s: LedgerJobSettings) -> dict[str, Any]:
    """All entries: number, hash, kind, author, time."""
    with open_from(s) as ledger:
        view = read_view(ledger)
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


def members(s: LedgerJobSettings) -> dict[str, Any]:
    """Propose a new council (`members`), or sign a proposal (`statement`); append it once enough have
    signed.
    """
    with open_from(s) as ledger:
        us, view = owner_of(s, ledger), read_view(ledger)
        index, council = view.councils[-1]
        if s.statement is not None:
            data = _read(s.statement)
            said = parse(envelope.open_envelope(data).payload)
            if not isinstance(said, Membership):
                raise ClaimError("is no membership; give a proposed one", field="statement")
            data = envelope.merge(data, envelope.sign(said.payload(), us.identity))
        else:
            named = _members(s)
            if not named:
                raise SettingsError("is required: who shall be on the council", field="members")
            previous = Ref(index, view.entries[index].leaf)
            data = seal(
                Membership(
                    signer=us.identity.public_key, ledger=view.origin, time=us.now(), members=tuple(named),
                    threshold=s.threshold or len(named) // 2 + 1, bits=s.bits, window=s.window,
                    previous=previous,
                ),
                us.identity,
            )  # fmt: skip
        signed = set(unseal(data)[1]) & set(council.members)
        enough = len(signed) >= council.threshold
        result: dict[str, Any] = {"signed": len(signed), "threshold": council.threshold, "appended": enough}
        if enough:
            result["index"] = ledger.append(data)
        else:
            if s.out is None:
                raise SettingsError(
                    "is required: where the proposal goes, to be signed by others", field="out"
                )
            _write(s.out, data)
        return result


def exhibit(s: LedgerJobSettings) -> dict[str, Any]:
    """Answer a claim with an earlier-stamped model of ours."""
    if s.claim is None or s.model is None:
        raise SettingsError("is required, and --model", field="claim")
    with open_from(s) as ledger:
        us = owner_of(s, ledger)
        ref = owner.exhibit(us, archive_of(s), s.claim, read_bytes(s.model, endpoint=s.endpoint))
        return {"index": ref.index, "id": ref.leaf.hex()}


def bundle(s: LedgerJobSettings) -> dict[str, Any]:
    """Pack a claim with all its proofs into one file."""
    if s.claim is None or s.out is None:
        raise SettingsError("is required, and --out", field="claim")
    with open_from(s) as ledger:
        view = read_view(ledger)
        entry, _ = find_claim(view, s.claim)
        against = write_bundle(s.out, ledger, view, entry, archive_of(s))
        return {"bundle": str(s.out), "size": against.size, "root": against.root.hex()}


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


def _members(s: LedgerJobSettings) -> list[bytes]:
    """Public keys from hexadecimal digits or from identity files (only their public half is read)."""
    named = []
    for one in (part.strip() for part in (s.members or "").split(",")):
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
    from mtlsign.storage.strict_json import strict_json

    found = strict_json(_read(path), limit=64 * 1024, where="members")
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
