"""C2SP checkpoints with cosignature/v1 lines (c2sp.org/tlog-checkpoint, c2sp.org/tlog-cosignature).

A checkpoint is a signed note: origin line, size, root, a blank line, and one line for each co-signer:

    mtlsign/ledger/v1/<origin>
    20852163
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

    — mtlsign/member/<public key> <base64(key id ‖ time ‖ Ed25519 signature)>

The ledger itself has no key, so the note has no signature line of a log. A checkpoint has no evidential value
until enough council members have co-signed it.
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
from mtlsign.storage.versions import PUBLISH_AGAIN
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import is_valid_signature

ORIGIN = "mtlsign/ledger/v1/"
MEMBER = "mtlsign/member/"
COSIGNATURE_V1 = 0x04
MAX_NOTE = 64 * 1024
MAX_LINES = 128
_OLD_ORIGIN = "mtlsign/ledger/v0/"

_SIZE = re.compile(r"0|[1-9][0-9]{0,13}")
_PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")
_LINE = re.compile(r"— ([^\s+]+) ([A-Za-z0-9+/]+={0,2})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tree of one ledger: the ledger's origin (leaf hash of entry 0), number of entries, root.

    Raises:
        ClaimError: no tree has this number of entries, or the root is no hash.
    """

    origin: bytes
    size: int
    root: bytes

    def __post_init__(self) -> None:
        """Check values that may come from a damaged or forged store."""
        if not 0 <= self.size <= MAX_SIZE or len(self.root) != 32:
            raise ClaimError(
                "A checkpoint has an impossible size or root. Use a complete copy of the ledger.",
                field="head",
            )

    def body(self) -> str:
        """Return the signed text: three lines, each with its line break."""
        root = base64.b64encode(self.root).decode("ascii")
        return f"{ORIGIN}{self.origin.hex()}\n{self.size}\n{root}\n"


@dataclass(frozen=True, slots=True)
class Cosignature:
    """One co-signer's line: stated name, stated key id, clock in POSIX seconds, signature."""

    name: str
    key_id: bytes
    time: int
    signature: bytes

    @property
    def member(self) -> bytes | None:
        """Public key in the name of the line, unverified; None if it is not the name of a member."""
        digits = self.name.removeprefix(MEMBER)
        if len(self.name) != len(MEMBER) + 64 or not _PUBLIC_KEY.fullmatch(digits):
            return None
        return bytes.fromhex(digits)

    def to_line(self) -> str:
        """Return the line of the note, without its line break."""
        blob = self.key_id + self.time.to_bytes(8, "big") + self.signature
        return f"— {self.name} {base64.b64encode(blob).decode('ascii')}"

    def is_valid_for(self, body: str, public_key: bytes) -> bool:
        """Return whether this is `public_key`'s valid co-signature of `body` under that member's name."""
        name_matches = self.name == MEMBER + public_key.hex() and self.key_id == key_id(self.name, public_key)
        return name_matches and self.has_valid_signature(body, public_key)

    def has_valid_signature(self, body: str, public_key: bytes) -> bool:
        """Return whether the signature itself is valid, regardless of the name."""
        message = signed_message(body, self.time)
        return self.time < 2**63 and is_valid_signature(public_key, self.signature, message)


def key_id(name: str, public_key: bytes, kind: int = COSIGNATURE_V1) -> bytes:
    """Return the C2SP key id, 4 bytes.

    Args:
        name: name of the signer in the note.
        public_key: 32 bytes.
        kind: signature type (0x04: cosignature/v1).
    """
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public_key).digest()[:4]


def signed_message(body: str, time: int) -> bytes:
    """Return the message that a cosignature/v1 signs."""
    return f"cosignature/v1\ntime {time}\n{body}".encode()


def cosign(identity: Identity, checkpoint: Checkpoint, time: int) -> Cosignature:
    """Return a member's co-signature. `witness` decides whether a checkpoint may be co-signed.

    Args:
        identity: the co-signer.
        checkpoint: the tree to sign.
        time: the co-signer's clock in POSIX seconds.
    """
    name = MEMBER + identity.public_key.hex()
    signature = identity.sign(signed_message(checkpoint.body(), time))
    return Cosignature(name, key_id(name, identity.public_key), time, signature)


def parse_line(line: str) -> Cosignature:
    """Parse one signature line of a note.

    Raises:
        ClaimError: it does not have the form of a cosignature/v1.
    """
    match = _LINE.fullmatch(line)
    try:
        blob = base64.b64decode(match[2], validate=True) if match else b""
        if match is None or len(blob) != 76 or base64.b64encode(blob).decode("ascii") != match[2]:
            raise ValueError
    except (ValueError, binascii.Error):
        raise ClaimError(
            "A line is not a cosignature/v1 line. Fetch the checkpoint once more.", field="head"
        ) from None
    return Cosignature(match[1], blob[:4], int.from_bytes(blob[4:12], "big"), blob[12:])


def encode_signed_note(checkpoint: Checkpoint, lines: Iterable[Cosignature]) -> bytes:
    """Return the signed note of a checkpoint, its lines sorted by name."""
    ordered = sorted(lines, key=lambda line: (line.name, line.time))
    return (checkpoint.body() + "\n" + "".join(line.to_line() + "\n" for line in ordered)).encode()


def parse_signed_note(data: bytes) -> tuple[Checkpoint, tuple[Cosignature, ...]]:
    """Parse an untrusted signed note into a checkpoint and its co-signatures, which are not verified.

    Raises:
        ClaimError: the bytes are not one checkpoint of this version in its unique encoding.
    """
    invalid = ClaimError("The file is not a checkpoint. Write one with jobs/ledger.py head.", field="head")
    if len(data) > MAX_NOTE:
        raise invalid
    try:
        body, separator, signatures = data.decode("utf-8").partition("\n\n")
    except UnicodeDecodeError:
        raise invalid from None
    body_lines, lines = body.split("\n"), signatures.split("\n")
    if len(body_lines) != 3 or not separator or lines[-1] or not 1 <= len(lines) <= MAX_LINES + 1:
        raise invalid
    origin, size, root = body_lines
    if origin.startswith(_OLD_ORIGIN):
        raise ClaimError(
            "The format is 'mtlsign/ledger/v0', version 0, which this release does not read. "
            f"{PUBLISH_AGAIN}",
            field="head",
        )
    try:
        checkpoint = Checkpoint(
            bytes.fromhex(origin.removeprefix(ORIGIN)), int(size), base64.b64decode(root, validate=True)
        )
    except (ClaimError, ValueError, binascii.Error):
        raise invalid from None
    if not _SIZE.fullmatch(size) or len(checkpoint.origin) != 32 or checkpoint.body() != body + "\n":
        raise invalid
    return checkpoint, tuple(parse_line(line) for line in lines[:-1])


def earliest_valid_line(
    checkpoint: Checkpoint, lines: Iterable[Cosignature], member: bytes
) -> Cosignature | None:
    """Return a member's earliest valid line, or None.

    Args:
        checkpoint: the co-signed tree.
        lines: stored lines from any sender, unverified.
        member: public key, 32 bytes.
    """
    body = checkpoint.body()
    valid = [line for line in lines if line.is_valid_for(body, member)]
    return min(valid, key=lambda line: (line.time, line.signature), default=None)


def cosigner_times(
    checkpoint: Checkpoint, lines: Sequence[Cosignature], members: Iterable[bytes]
) -> dict[bytes, int]:
    """Return the members that co-signed this checkpoint, each with the time by its clock.

    Args:
        checkpoint: the co-signed tree.
        lines: lines of one note; lines of non-members are ignored.
        members: public keys, 32 bytes each.

    Raises:
        ClaimError: a line in a member's name is invalid, or a member has two. C2SP requires rejecting such
            a note.
    """
    body, known = checkpoint.body(), {MEMBER + member.hex(): member for member in members}
    times: dict[bytes, int] = {}
    for line in lines:
        member = known.get(line.name)
        if member is None or line.key_id != key_id(line.name, member):
            continue
        if member in times or not line.has_valid_signature(body, member):
            raise ClaimError(
                "A member's co-signature is invalid. Fetch the checkpoint once more.", field="head"
            )
        times[member] = line.time
    return times


def median(values: Iterable[int]) -> int:
    """Return the median of co-signers' times. Of two middle times it is the later one."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
