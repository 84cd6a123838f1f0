"""Bundle: a single file that proves a claim offline, with entries, proofs, checkpoints and models.

A bundle is a ZIP without compression:

    bundle.json            {"format":"mtlsign/bundle/v1","claim":<index>}
    head                   the checkpoint (signed note) against which all entries are proven
    entries/<index>        an envelope      entries/<index>.path    its inclusion path, 32 bytes a hash
    heads/<size>           an earlier checkpoint   heads/<size>.proof      its consistency proof to `head`
    blobs/<sha256>         reference, accused model, marked model, trained head, exhibits

A bundle cannot show that the ledger lacks further entries (an earlier opening of the key, an exhibit, a
second claim). Only the ledger can show that.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mtlsign.claims import merkle
from mtlsign.claims.blob_store import MAX_MODEL, BlobStore
from mtlsign.claims.bundle_file import FORMAT, BundleFile, damaged_error, open_bundle
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.council import CountedVote, tally_votes
from mtlsign.claims.judging.judge import ClaimVerifier
from mtlsign.claims.judging.lineage import DisputeResult, resolve_dispute
from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature
from mtlsign.claims.ledger.view import Entry, LedgerView
from mtlsign.claims.statements.types import Claim, Exhibit, Membership, Register, Statement, Vote
from mtlsign.errors import ClaimError, KeyMaterialError, LedgerError
from mtlsign.storage.local import open_atomic

NamedBytes = tuple[str, bytes]
SignedNote = tuple[Checkpoint, tuple[Cosignature, ...]]


@dataclass(frozen=True)
class CheckedBundle:
    """Result of an offline check.

    Attributes:
        view: the part of the ledger that the bundle contains.
        entry: entry of the claim.
        claim: its statement.
        checkpoint: the checkpoint on which the result rests.
        pinned: the caller supplied that checkpoint; otherwise the bundle did.
        dispute: the verifier's findings and the claim's standing.
        votes: all votes on the claim.
    """

    view: LedgerView
    entry: Entry
    claim: Claim
    checkpoint: Checkpoint
    pinned: bool
    dispute: DisputeResult
    votes: tuple[CountedVote, ...]


def write_bundle(
    path: Path, ledger: Ledger, view: LedgerView, entry: Entry, archive: BlobStore
) -> Checkpoint:
    """Write the bundle of one claim and return the newest confirmed checkpoint, against which it is proven.

    Args:
        path: file to write.
        ledger: the ledger.
        view: its view.
        entry: entry of the claim.
        archive: contains models and references by digest.

    Raises:
        ClaimError: no confirmed checkpoint contains the claim yet, or the file cannot be written.
        ArtifactError: the archive lacks parts that the claim names.
    """
    claim = entry.statement
    if not isinstance(claim, Claim) or view.time(entry.index) is None:
        raise ClaimError(
            "The claim is not under a confirmed checkpoint yet. Write the bundle when the council has "
            "co-signed.",
            field="bundle",
        )
    newest = view.confirmed[-1].checkpoint
    indices = sorted({i for i in _relevant_entries(view, entry, claim) if i < newest.size})
    header = {"format": FORMAT, "claim": entry.index}
    members = [("bundle.json", json.dumps(header, separators=(",", ":")).encode())]
    members += _checkpoint_members(ledger, view, newest, indices)
    members += _entry_members(ledger, newest, indices)
    required, optional = _blob_digests(view, entry, claim)
    digests = dict.fromkeys(required)
    digests |= dict.fromkeys(d for d in optional if d not in digests and archive.has(d))
    members += [(f"blobs/{digest.hex()}", archive.get(digest, MAX_MODEL)) for digest in digests]
    _write(path, members)
    return newest


def _relevant_entries(view: LedgerView, entry: Entry, claim: Claim) -> Iterator[int]:
    """Yield the indices of councils, of the claim's references, votes and exhibits, and of related claims."""
    yield from (0, claim.publish.index, claim.register.index, entry.index)
    for other in view.entries.values():
        statement = other.statement
        is_vote = isinstance(statement, Vote) and statement.claim == entry.ref
        if isinstance(statement, Membership) or is_vote:
            yield other.index
        elif isinstance(statement, Exhibit) and statement.claim == entry.ref:
            yield from (other.index, statement.stamp.index)
        elif other.opening == claim.opening or _concerns(statement, claim):
            yield other.index


def _concerns(statement: Statement | None, claim: Claim) -> bool:
    """Return whether a statement claims by the same publication, or registers the same model."""
    if isinstance(statement, Register):
        return claim.suspect in [digest for _, digest in statement.models]
    return isinstance(statement, Claim) and statement.publish == claim.publish


def _checkpoint_members(
    ledger: Ledger, view: LedgerView, newest: Checkpoint, indices: Iterable[int]
) -> Iterator[NamedBytes]:
    """Yield the newest checkpoint, and the first one of each entry with its consistency proof."""
    cosignatures = ledger.cosignatures(view.origin)
    sizes = {first.checkpoint.size for first in map(view.first_confirmed, indices) if first is not None}
    for confirmed in view.confirmed:
        checkpoint = confirmed.checkpoint
        if checkpoint != newest and checkpoint.size not in sizes:
            continue
        stored = [line for signed, line in cosignatures if signed == checkpoint]
        earliest = [
            checkpoints.earliest_valid_line(checkpoint, stored, member)
            for member in view.council(checkpoint.size).members
        ]
        note = checkpoints.encode_signed_note(checkpoint, [line for line in earliest if line is not None])
        if checkpoint == newest:
            yield "head", note
        else:
            yield f"heads/{checkpoint.size}", note
            proof = ledger.prove_consistency(checkpoint.size, newest.size)
            yield f"heads/{checkpoint.size}.proof", b"".join(proof)


def _entry_members(ledger: Ledger, newest: Checkpoint, indices: Iterable[int]) -> Iterator[NamedBytes]:
    for index in indices:
        data, path = ledger.get(index), ledger.prove(index, newest.size)
        if not merkle.verify_inclusion(merkle.leaf_hash(data), index, newest.size, path, newest.root):
            raise LedgerError(
                f"The ledger does not prove entry {index} under its checkpoint. Run jobs/ledger.py check.",
                field="ledger",
            )
        yield f"entries/{index}", data
        yield f"entries/{index}.path", b"".join(path)


def _blob_digests(view: LedgerView, entry: Entry, claim: Claim) -> tuple[list[bytes], list[bytes]]:
    """Return the digests without which the claim cannot be checked, and those that only the lineage needs."""
    required = [claim.suspect]
    with suppress(KeyMaterialError):
        required.append(bytes.fromhex(claim.opening.parse().reference))
    head = claim.heads[claim.key_index] if claim.key_index < len(claim.heads) else None
    if head is not None:
        required.append(head)
    exhibits = [exhibit.model for _, exhibit in view.all(Exhibit) if exhibit.claim == entry.ref]
    return required, [claim.model, *exhibits]


def _write(path: Path, members: Iterable[NamedBytes]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            open_atomic(path, mode=0o666) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            for name, data in members:
                archive.writestr(zipfile.ZipInfo(name), data)
    except OSError as error:
        raise ClaimError(f"{path}: {error.strerror}. Pass another file.", field="bundle") from None


def check_bundle(
    path: Path, judge: ClaimVerifier, *, pinned: bytes | None = None, bits: int = 0
) -> CheckedBundle:
    """Check a bundle offline: signatures, proofs, co-signatures, and the claim by Algorithm 1.

    Args:
        path: the untrusted bundle.
        judge: verifies keys on models.
        pinned: checkpoint (signed note) that the verifier has from another source and trusts. Without it the
            bundle only confirms itself: `CheckedBundle.pinned` is False, and the claim is at most
            `self_attested`.
        bits: minimum evidence that the verifier accepts, whatever the bundle's council requires.

    Raises:
        ClaimError: the file is not a bundle, or does not prove its content. A proven claim that is wrong is
            a standing and not an error.
    """
    with open_bundle(path) as bundle:
        claim_index = bundle.claim_index()
        newest, lines = checkpoints.parse_signed_note(bundle.read("head"))
        notes: list[SignedNote] = [(newest, lines)]
        notes += [_earlier_checkpoint(bundle, size, newest) for size in bundle.checkpoint_sizes]
        stated = [(checkpoint, line) for checkpoint, note_lines in notes for line in note_lines]
        roots = {checkpoint.size: checkpoint.root for checkpoint, _ in notes}
        trusted, pinned_lines = _pinned(pinned, newest, roots) if pinned is not None else (newest, ())
        rows = _proven_entries(bundle, newest)
        bundle.verify_blobs()
        view = LedgerView.assemble(rows, [*stated, *((trusted, line) for line in pinned_lines)], roots)
        _require_valid_lines(view, stated)
        if view.origin != newest.origin or trusted not in [c.checkpoint for c in view.confirmed]:
            raise ClaimError(
                f"The checkpoint of {trusted.size} entries lacks co-signatures of its council. Get a "
                "confirmed one.",
                field="head",
            )
        entry, claim = find_claim(view, str(claim_index))
        if entry.index >= trusted.size:
            raise ClaimError(
                "The pinned checkpoint does not contain the claim. Pass a newer checkpoint.", field="head"
            )
        dispute = resolve_dispute(
            view, [str(entry.index)], bundle, judge, bits=bits, pinned=pinned is not None
        )
        votes = tally_votes(view, entry, claim).votes
        return CheckedBundle(view, entry, claim, trusted, pinned is not None, dispute, votes)


def _earlier_checkpoint(bundle: BundleFile, size: int, newest: Checkpoint) -> SignedNote:
    """Return an earlier checkpoint, whose consistency with the newest one is proven, and its lines."""
    checkpoint, lines = checkpoints.parse_signed_note(bundle.read(f"heads/{size}"))
    proof = bundle.hashes(f"heads/{size}.proof")
    if checkpoint.size != size or not merkle.verify_consistency(
        size, checkpoint.root, newest.size, newest.root, proof
    ):
        raise damaged_error(f"The checkpoint of {size} entries is not extended by the newest one")
    return checkpoint, lines


def _proven_entries(bundle: BundleFile, newest: Checkpoint) -> dict[int, bytes]:
    rows: dict[int, bytes] = {}
    for index in bundle.entry_indices:
        data, path = bundle.read(f"entries/{index}"), bundle.hashes(f"entries/{index}.path")
        if not merkle.verify_inclusion(merkle.leaf_hash(data), index, newest.size, path, newest.root):
            raise damaged_error(f"Entry {index} is not proven by the checkpoint")
        rows[index] = data
    if 0 not in rows:
        raise damaged_error("The bundle lacks entry 0, which creates the ledger")
    return rows


def _require_valid_lines(view: LedgerView, cosignatures: Iterable[tuple[Checkpoint, Cosignature]]) -> None:
    """Raise for an invalid line. A line that is lost by damage would otherwise move an entry's time."""
    for checkpoint, line in cosignatures:
        members = view.council(checkpoint.size).members
        if not any(line.is_valid_for(checkpoint.body(), member) for member in members):
            raise damaged_error(f"A co-signature of {checkpoint.size} entries is invalid")


def _pinned(note: bytes, newest: Checkpoint, roots: dict[int, bytes]) -> SignedNote:
    """Return the pinned checkpoint with its lines, if the bundle proves that tree."""
    checkpoint, lines = checkpoints.parse_signed_note(note)
    if checkpoint.origin != newest.origin:
        raise ClaimError(
            "The pinned checkpoint belongs to another ledger. Pass one of the bundle's ledger.", field="head"
        )
    if checkpoint.size not in roots:
        raise ClaimError(
            f"The bundle proves nothing about a checkpoint of {checkpoint.size} entries. Get a bundle that "
            "extends it.",
            field="head",
        )
    if roots[checkpoint.size] != checkpoint.root:
        raise ClaimError(
            "The bundle is from a forked ledger: its tree differs from the pinned one. Do not accept it.",
            field="head",
        )
    return checkpoint, lines
