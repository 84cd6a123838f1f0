"""Tree heads as C2SP checkpoints with cosignature/v1 lines (c2sp.org/tlog-checkpoint, /tlog-cosignature).

A head is a signed note: origin line, size, root, a blank line, and one line for each co-signer:

    mtlsign/ledger/v0/<origin>
    20852163
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

    — mtlsign/member/<public key> <base64(key id ‖ time ‖ Ed25519 signature)>

The ledger has no key of its own, so no line is the log's: a head says nothing until enough members co-signed
it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mtlsign.claims.merkle import MAX_SIZE
from mtlsign.errors import ClaimError
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import is_valid_signature

ORIGIN = "mtlsign/ledger/v0/"
MEMBER = "mtlsign/member/"
COSIGNATURE_V1 = 0x04
MAX_NOTE = 64 * 1024
MAX_LINES = 128

_SIZE = re.compile(r"0|[1-9][0-9]{0,13}")
_LINE = re.compile(r"— ([^\s+]+) ([A-Za-z0-9+/]+={0,2})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tree of one ledger: the ledger's origin (hash of its entry 0), number of entries, root."""

    origin: bytes
    size: int
    root: bytes

    def body(self) -> str:
        """The checkpoint's text, three lines, each with its line break."""
        root = base64.b64encode(self.root).decode("ascii")
        return f"{ORIGIN}{self.origin.hex()}\n{self.size}\n{root}\n"


@dataclass(frozen=True, slots=True)
class Cosignature:
    """One co-signer's line: the name it gives, the key id it gives, its clock (POSIX seconds), its
    signature.
    """

    name: str
    key_id: bytes
    time: int
    signature: bytes

    def line(self) -> str:
        """The note's line, without its line break."""
        blob = self.key_id + self.time.to_bytes(8, "big") + self.signature
        return f"— {self.name} {base64.b64encode(blob).decode('ascii')}"

    def holds(self, body: str, public_key: bytes) -> bool:
        """Whether this is `public_key`'s valid co-signature of a checkpoint's text under its member's
        name.
        """
        named = self.name == MEMBER + public_key.hex() and self.key_id == key_id(self.name, public_key)
        return named and self.verifies(body, public_key)

    def verifies(self, body: str, public_key: bytes) -> bool:
        """Whether the signature itself holds, whatever the name."""
        return self.time < 2**63 and is_valid_signature(public_key, self.signature, message(body, self.time))


def key_id(name: str, public_key: bytes, kind: int = COSIGNATURE_V1) -> bytes:
    """C2SP key id, 4 bytes; `kind` is the signature type (0x04: cosignature/v1)."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public_key).digest()[:4]


def message(body: str, time: int) -> bytes:
    """What a cosignature/v1 signs."""
    return f"cosignature/v1\ntime {time}\n{body}".encode()


def cosign(identity: Identity, head: Checkpoint, time: int) -> Cosignature:
    """A member's co-signature; `witness` says when one may be given."""
    name = MEMBER + identity.public_key.hex()
    signature = identity.sign(message(head.body(), time))
    return Cosignature(name, key_id(name, identity.public_key), time, signature)


def parse_line(line: str) -> Cosignature:
    """One signature line of a note; ClaimError unless it has the size of a cosignature/v1."""
    found = _LINE.fullmatch(line)
    try:
        blob = base64.b64decode(found[2], validate=True) if found else b""
        if found is None or len(blob) != 76 or base64.b64encode(blob).decode("ascii") != found[2]:
            raise ValueError
    except (ValueError, binascii.Error):
        raise ClaimError("is no cosignature/v1 line; fetch the head again", field="head") from None
    return Cosignature(found[1], blob[:4], int.from_bytes(blob[4:12], "big"), blob[12:])


def encode_signed_note(head: Checkpoint, lines: Iterable[Cosignature]) -> bytes:
    """The signed note of a head, its lines sorted by name."""
    signed = sorted(lines, key=lambda line: (line.name, line.time))
    return (head.body() + "\n" + "".join(line.line() + "\n" for line in signed)).encode()


def parse_signed_note(data: bytes) -> tuple[Checkpoint, tuple[Cosignature, ...]]:
    """A head and its co-signatures from anywhere; nothing is verified yet.

    Raises:
        ClaimError: the bytes are not one head of a ledger of this version in its one spelling.
    """
    bad = ClaimError("is no head of a ledger; jobs/ledger.py head writes one", field="head")
    if len(data) > MAX_NOTE:
        raise bad
    try:
        body, mark, signed = data.decode("utf-8").partition("\n\n")
    except UnicodeDecodeError:
        raise bad from None
    lines, rest = body.split("\n"), signed.split("\n")
    if len(lines) != 3 or not mark or rest[-1] or not 1 <= len(rest) <= MAX_LINES + 1:
        raise bad
    origin, size, root = lines
    try:
        found = Checkpoint(
            bytes.fromhex(origin.removeprefix(ORIGIN)), int(size), base64.b64decode(root, validate=True)
        )
    except (ValueError, binascii.Error):
        raise bad from None
    if not _SIZE.fullmatch(size) or found.size > MAX_SIZE or (len(found.origin), len(found.root)) != (32, 32):
        raise bad
    if found.body() != body + "\n":
        raise bad
    return found, tuple(parse_line(line) for line in rest[:-1])


def earliest_valid_line(head: Checkpoint, lines: Iterable[Cosignature], member: bytes) -> Cosignature | None:
    """A member's earliest line that holds, among lines that anybody may have stored; None: there is none."""
    body = head.body()
    held = [line for line in lines if line.holds(body, member)]
    return min(held, key=lambda line: (line.time, line.signature), default=None)


def cosigner_times(
    head: Checkpoint, lines: Sequence[Cosignature], members: Iterable[bytes]
) -> dict[bytes, int]:
    """Who of `members` co-signed this head, and when by each one's clock. Strangers' lines are ignored.

    Raises:
        ClaimError: a line in a member's name does not hold, or a member has two (C2SP: reject such a note).
    """
    body, known = head.body(), {MEMBER + member.hex(): member for member in members}
    found: dict[bytes, int] = {}
    for line in lines:
        member = known.get(line.name)
        if member is None or line.key_id != key_id(line.name, member):
            continue
        if member in found or not line.verifies(body, member):
            raise ClaimError("a member's co-signature does not hold; fetch the head again", field="head")
        found[member] = line.time
    return found


def median(values: Iterable[int]) -> int:
    """Median of co-signers' times; of two middle ones the later, which never favours the sender."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
