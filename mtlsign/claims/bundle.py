"""One file that proves a claim without any network: entries, proofs, heads and the bytes behind them.

A bundle is a ZIP without compression:

    bundle.json            {"format":"mtlsign/bundle/v0","claim":<index>}
    head                   the head (signed note) against which everything is proven
    entries/<index>        an envelope      entries/<index>.path    its inclusion path, 32 bytes a hash
    heads/<size>           an earlier head  heads/<size>.proof      its consistency proof to `head`
    blobs/<sha256>         reference, accused model, marked model, free head, exhibits

It shows what is there; it cannot show that something is *not* in the ledger (an earlier opening of the key,
an exhibit, a second claim). For that, ask the ledger.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlsign.claims import merkle
from mtlsign.claims.blob_store import MAX_HEAD, MAX_MODEL, MAX_REFERENCE, BlobStore
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.judge import ClaimVerifier
from mtlsign.claims.judging.lineage import DisputeResult, resolve_dispute
from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature
from mtlsign.claims.ledger.view import Entry, LedgerView
from mtlsign.claims.statements.envelope import MAX_ENVELOPE
from mtlsign.claims.statements.types import Claim, Exhibit, Membership, Vote
from mtlsign.errors import ArtifactError, ClaimError, KeyMaterialError, LedgerError
from mtlsign.storage.strict_json import parse_strict_json, require_fields

FORMAT = "mtlsign/bundle/v0"
MAX_MEMBERS = 2000
MAX_BUNDLE = 6 * 2**30
MAX_PATH = 32 * merkle.MAX_PROOF
_NUMBER = r"(?:0|[1-9][0-9]{0,13})"
_LIMITS: list[tuple[re.Pattern[str], int]] = [
    (re.compile(r"bundle\.json"), 256),
    (re.compile(r"head"), checkpoints.MAX_NOTE),
    (re.compile(rf"entries/{_NUMBER}"), MAX_ENVELOPE),
    (re.compile(rf"entries/{_NUMBER}\.path"), MAX_PATH),
    (re.compile(rf"heads/{_NUMBER}"), checkpoints.MAX_NOTE),
    (re.compile(rf"heads/{_NUMBER}\.proof"), MAX_PATH),
    (re.compile(r"blobs/[0-9a-f]{64}"), max(MAX_MODEL, MAX_HEAD, MAX_REFERENCE)),
]


@dataclass(frozen=True)
class Checked:
    """What a bundle proves: the sparse view of the ledger, the claim, and its standing by our own judge."""

    view: LedgerView
    entry: Entry
    claim: Claim
    head: Checkpoint
    pinned: bool
    dispute: DisputeResult


def write_bundle(
    path: Path, ledger: Ledger, view: LedgerView, entry: Entry, archive: BlobStore
) -> Checkpoint:
    """Write the bundle of one claim against the newest head that counts and holds it; returns that head.

    Raises:
        ClaimError: no head that counts holds the claim yet, or the file cannot be written.
        ArtifactError: the archive lacks what the claim names.
    """
    claim = entry.statement
    if not isinstance(claim, Claim) or view.time(entry.index) is None:
        raise ClaimError(
            "is not yet under a head that counts; write the bundle once the council co-signed", field="bundle"
        )
    head = view.heads[-1].head
    wanted = sorted({i for i in _wanted(view, entry, claim) if i < head.size})
    files: list[tuple[str, bytes]] = [
        ("bundle.json", json.dumps({"format": FORMAT, "claim": entry.index}, separators=(",", ":")).encode())
    ]
    signed = ledger.cosignatures(view.origin)
    sizes = {found.head.size for found in map(view.first_head, wanted) if found is not None}
    for counted in view.heads:
        if counted.head == head or counted.head.size in sizes:
            council = view.council(counted.head.size)
            note = checkpoints.encode_signed_note(counted.head, _lines(counted.head, signed, council))
            files.append(("head" if counted.head == head else f"heads/{counted.head.size}", note))
            if counted.head != head:
                proof = ledger.prove_consistency(counted.head.size, head.size)
                files.append((f"heads/{counted.head.size}.proof", b"".join(proof)))
    for index in wanted:
        data, path_up = ledger.get(index), ledger.prove(index, head.size)
        if not merkle.verify_inclusion(merkle.leaf_hash(data), index, head.size, path_up, head.root):
            raise LedgerError(f"does not prove entry {index} under its own head; check it", field="ledger")
        files += [(f"entries/{index}", data), (f"entries/{index}.path", b"".join(path_up))]
    needed, useful = _blobs(view, entry, claim)
    files += [(f"blobs/{digest.hex()}", archive.get(digest, MAX_MODEL)) for digest in dict.fromkeys(needed)]
    for digest in dict.fromkeys(useful):
        if digest not in needed and archive.has(digest):
            files.append((f"blobs/{digest.hex()}", archive.get(digest, MAX_MODEL)))
    _write(path, files)
    return head


def _wanted(view: LedgerView, entry: Entry, claim: Claim) -> Iterator[int]:
    """Entries that bear on a claim: councils, what it names, its votes and exhibits, its publication's
    claims.
    """
    yield from (0, claim.publish.index, claim.register.index, entry.index)
    for other in view.entries.values():
        said = other.statement
        if isinstance(said, Membership) or (isinstance(said, Vote) and said.claim == entry.ref):
            yield other.index
        elif isinstance(said, Exhibit) and said.claim == entry.ref:
            yield from (other.index, said.stamp.index)
        elif isinstance(said, Claim) and (said.publish == claim.publish or said.opening == claim.opening):
            yield other.index


def _blobs(view: LedgerView, entry: Entry, claim: Claim) -> tuple[list[bytes], list[bytes]]:
    """Digests that the claim cannot be checked without, and those that lineage would like to have."""
    needed = [claim.suspect]
    with suppress(KeyMaterialError):
        needed.append(bytes.fromhex(claim.opening.parse().reference))
    if claim.key_index < len(claim.heads) and claim.heads[claim.key_index] is not None:
        needed.append(claim.heads[claim.key_index] or b"")
    shown = [said.model for _, said in view.all(Exhibit) if said.claim == entry.ref]
    return needed, [claim.model, *shown]


def _lines(
    head: Checkpoint, signed: Iterable[tuple[Checkpoint, Cosignature]], council: Membership
) -> list[Cosignature]:
    stored = [line for at, line in signed if at == head]
    lines = [checkpoints.earliest_valid_line(head, stored, member) for member in council.members]
    return [line for line in lines if line is not None]


def _write(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "x", zipfile.ZIP_STORED) as out:
            for name, data in files:
                out.writestr(zipfile.ZipInfo(name), data)
        part.replace(path)
    except OSError as error:
        raise ClaimError(f"{path}: {error.strerror}; name another file", field="bundle") from None
    finally:
        part.unlink(missing_ok=True)


class _Zip(BlobStore):
    """A bundle's members, each read whole and within its limit; its blobs serve as the archive."""

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self.file = file
        self.members: dict[str, zipfile.ZipInfo] = {}
        infos = file.infolist()
        bad = not 1 <= len(infos) <= MAX_MEMBERS or file.comment or min(i.header_offset for i in infos) != 0
        if bad or sum(info.file_size for info in infos) > size:
            raise _damaged("is no bundle of this version")
        for info in infos:
            limit = next((limit for pattern, limit in _LIMITS if pattern.fullmatch(info.orig_filename)), None)
            if limit is None or info.filename != info.orig_filename or info.filename in self.members:
                raise _damaged(f"holds a member {ascii(info.orig_filename)[:80]} that does not belong there")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise _damaged("holds a compressed member")
            if info.flag_bits & ~0x800 or info.extra or info.comment or info.file_size > limit:
                raise _damaged("holds a member that is encrypted, decorated or too large")
            self.members[info.filename] = info

    def read(self, name: str) -> bytes:
        """A member's bytes. Raises ClaimError when it is missing or damaged."""
        info = self.members.get(name)
        if info is None:
            raise _damaged(f"lacks {name}")
        try:
            return self.file.read(info)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError):
            raise _damaged(f"has a damaged {name}") from None

    def hashes(self, name: str) -> list[bytes]:
        """A member of concatenated 32-byte hashes."""
        data = self.read(name)
        if len(data) % 32:
            raise _damaged(f"has a damaged {name}")
        return [data[at : at + 32] for at in range(0, len(data), 32)]

    def get(self, digest: bytes, limit: int) -> bytes:
        name = f"blobs/{digest.hex()}"
        if name not in self.members or self.members[name].file_size > limit:
            raise ArtifactError(f"the bundle lacks {digest.hex()}; ask for a whole one", field="bundle")
        data = self.read(name)
        if hashlib.sha256(data).digest() != digest:
            raise _damaged(f"has other bytes than {name} says")
        return data

    def has(self, digest: bytes) -> bool:
        return f"blobs/{digest.hex()}" in self.members


def check_bundle(path: Path, judge: ClaimVerifier, *, pinned: bytes | None = None, bits: int = 0) -> Checked:
    """Check everything in a bundle without any network: signatures, proofs, co-signatures, Algorithm 1.

    Args:
        path: the bundle, from anybody.
        judge: decides on models, see `judge`.
        pinned: the head (signed note) that the verifier holds from elsewhere and trusts. Without it the
            bundle vouches for itself, and the result says `pinned` False.
        bits: the least evidence that the verifier accepts, whatever the bundle's council asked for.

    Raises:
        ClaimError, LedgerError: it is no bundle, or it does not prove what it shows. A claim that is proven
        and
            wrong is a standing, not an error.
    """
    with _opened(path) as bundle:
        got = require_fields(
            parse_strict_json(bundle.read("bundle.json"), limit=256, where="bundle"),
            "bundle",
            "format",
            "claim",
        )
        if got["format"] != FORMAT or type(got["claim"]) is not int:
            raise _damaged("is no bundle of this version")
        head, lines = checkpoints.parse_signed_note(bundle.read("head"))
        signed = [(head, line) for line in lines]
        roots = {head.size: head.root}
        for name in [name for name in bundle.members if re.fullmatch(rf"heads/{_NUMBER}", name)]:
            earlier, more = checkpoints.parse_signed_note(bundle.read(name))
            proof = bundle.hashes(f"{name}.proof")
            if name != f"heads/{earlier.size}" or not merkle.verify_consistency(
                earlier.size, earlier.root, head.size, head.root, proof
            ):
                raise _damaged(f"has a head of {earlier.size} entries that its own does not extend")
            signed += [(earlier, line) for line in more]
            roots[earlier.size] = earlier.root
        trusted = _pinned(pinned, head, roots) if pinned is not None else head
        stated = list(signed)
        if pinned is not None:
            signed += [(trusted, line) for line in checkpoints.parse_signed_note(pinned)[1]]
        raw = _entries(bundle, head)
        for name in bundle.members:
            if name.startswith("blobs/"):
                bundle.get(bytes.fromhex(name.removeprefix("blobs/")), MAX_MODEL)
        view = LedgerView.assemble(raw, signed, roots)
        for at, line in stated:  # in a bundle every line must hold: a lost one would move an entry's time
            if not any(line.holds(at.body(), member) for member in view.council(at.size).members):
                raise _damaged(f"has a co-signature of {at.size} entries that does not hold")
        if view.origin != head.origin or trusted not in [counted.head for counted in view.heads]:
            raise ClaimError(
                f"the head of {trusted.size} entries is not co-signed by enough of its council", field="head"
            )
        entry, claim = find_claim(view, str(got["claim"]))
        if entry.index >= trusted.size:
            raise ClaimError("the pinned head does not hold the claim yet; pin a newer one", field="head")
        done = resolve_dispute(view, [str(entry.index)], bundle, judge, bits=bits)
        return Checked(view, entry, claim, trusted, pinned is not None, done)


def _entries(bundle: _Zip, head: Checkpoint) -> dict[int, bytes]:
    raw: dict[int, bytes] = {}
    for name in bundle.members:
        if re.fullmatch(rf"entries/{_NUMBER}", name):
            index, data = int(name.removeprefix("entries/")), bundle.read(name)
            path = bundle.hashes(f"{name}.path")
            if not merkle.verify_inclusion(merkle.leaf_hash(data), index, head.size, path, head.root):
                raise _damaged(f"has an entry {index} that is not in its head")
            raw[index] = data
    if 0 not in raw:
        raise _damaged("lacks the entry that founds the ledger")
    return raw


def _pinned(note: bytes, head: Checkpoint, roots: dict[int, bytes]) -> Checkpoint:
    found, _ = checkpoints.parse_signed_note(note)
    if found.origin != head.origin:
        raise ClaimError("the pinned head is of another ledger", field="head")
    if roots.get(found.size) != found.root:
        known = found.size in roots
        raise ClaimError(
            "the bundle is from a forked ledger: its tree is not the pinned one"
            if known
            else f"the bundle proves nothing about a head of {found.size} entries; ask for one against it",
            field="head",
        )
    return found


@contextmanager
def _opened(path: Path) -> Iterator[_Zip]:
    try:
        size = path.stat().st_size
        if size > MAX_BUNDLE or not path.is_file():
            raise _damaged("is no file of at most 6 GiB")
        with zipfile.ZipFile(path) as file:
            yield _Zip(file, size)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError, OverflowError):
        raise _damaged("is no readable ZIP") from None
    except OSError as error:
        raise ClaimError(f"{path}: {error.strerror or error}; give a bundle", field="bundle") from None
    except KeyMaterialError as error:
        raise ClaimError(str(error)) from None
    except LedgerError as error:
        raise ClaimError(f"its entries are no ledger: {error}", field="bundle") from None


def _damaged(what: str) -> ClaimError:
    return ClaimError(f"{what}; get it again from whoever wrote it", field="bundle")


def to_json(checked: Checked) -> dict[str, Any]:
    """JSON-ready: standing, sentence, numbers, votes, times, the head that it rests on."""
    standing = checked.dispute.standings[0]
    return {
        "claim": checked.entry.leaf.hex(),
        "standing": standing.standing,
        "reason": standing.reason,
        "sentence": standing.sentence,
        "numbers": standing.numbers,
        "ledger": checked.view.origin.hex(),
        "head": {"size": checked.head.size, "root": checked.head.root.hex(), "pinned": checked.pinned},
        "suspect": checked.claim.suspect.hex(),
        "remarks": list(checked.view.remarks),
        "caveat": "A bundle cannot show that nothing else is in the ledger; ask the ledger for that.",
    }
