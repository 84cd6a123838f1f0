"""The six kinds of signed statements of owners, council members and accused parties (in-toto Statement v1).

Each statement is an immutable value with `payload()`; `parsing` reads untrusted payloads. A statement names
its author and its ledger (null only in the first entry). It can therefore neither pass for another kind nor
be copied to another ledger. `time` is the author's clock, which is information and not evidence.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import ClassVar

from mtlsign.errors import ClaimError
from mtlsign.watermark.keys.identity import length_prefixed
from mtlsign.watermark.keys.opening import OPENING_FORMAT, KeyOpening

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:mtlsign:v1:"
VOTES = ("accepted", "rejected", "unrelated", "needs_commitment", "not_verifiable", "inadmissible")

Fields = dict[str, object]


@dataclass(frozen=True, slots=True)
class Ref:
    """Reference to an earlier entry of the same ledger: number and leaf hash, which must both match."""

    index: int
    leaf: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementBase:
    """Common fields of all statements.

    Attributes:
        signer: the author's Ed25519 public key, 32 bytes.
        ledger: origin of the ledger, 32 bytes. None only in the membership that creates a ledger.
        time: the author's clock in POSIX seconds.
    """

    kind: ClassVar[str]
    signer: bytes
    ledger: bytes | None
    time: int

    def subject(self) -> list[tuple[str, str, bytes]]:
        """Return the subjects as (name, digest algorithm, digest) triples."""
        raise NotImplementedError

    def predicate(self) -> Fields:
        """Return the fields of this kind as JSON values."""
        raise NotImplementedError

    def payload(self) -> bytes:
        """Return the exact bytes to sign. `parsing.sign_statement` checks all other rules.

        Raises:
            ClaimError: a field has no JSON representation.
        """
        common: Fields = {"signer": self.signer.hex(), "ledger": _hex(self.ledger), "time": self.time}
        document = {
            "_type": STATEMENT,
            "subject": [
                {"name": name, "digest": {algorithm: d.hex()}} for name, algorithm, d in self.subject()
            ],
            "predicateType": PREDICATE + self.kind,
            "predicate": common | self.predicate(),
        }
        try:
            data = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError):
            raise ClaimError(
                "A field has no JSON representation. Use text and integers.", field=self.kind
            ) from None
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish(StatementBase):
    """Commitment ⟨time ‖ hash(key) ‖ hash(c_WM) ‖ hash(info)⟩ of the paper, and one to the marked model.

    `info` is the digest of the spec, which each key already contains. `commitments` defines the hashes.
    """

    kind = "publish"
    nonce: bytes
    keys_root: bytes
    keys_count: int
    heads: bytes
    model: bytes
    licence: str = ""
    recipient: str = ""

    def subject(self) -> list[tuple[str, str, bytes]]:  # noqa: D102
        return [("marked model", "mtlsignHidingV1", self.model)]

    def predicate(self) -> Fields:  # noqa: D102
        return {
            "nonce": self.nonce.hex(),
            "keys": {"root": self.keys_root.hex(), "count": self.keys_count},
            "head": self.heads.hex(),
            "licence": self.licence,
            "recipient": self.recipient,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Register(StatementBase):
    """Registration: timestamped digests of suspect models, made before any key is opened against them."""

    kind = "register"
    models: tuple[tuple[str, bytes], ...]

    def subject(self) -> list[tuple[str, str, bytes]]:  # noqa: D102
        return [(name, "sha256", digest) for name, digest in self.models]

    def predicate(self) -> Fields:  # noqa: D102
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(StatementBase):
    """Claim ⟨l_M ‖ hash(M) ‖ l_cWM ‖ key⟩ of the paper: one key opened against one registered model.

    A claim contains digests instead of locations. A reader looks them up in its operator's archives.
    """

    kind = "claim"
    publish: Ref
    register: Ref
    suspect: bytes
    opening: KeyOpening
    key_index: int
    key_salt: bytes
    key_path: tuple[bytes, ...]
    heads: tuple[bytes | None, ...]
    heads_salt: bytes
    model: bytes
    model_salt: bytes

    def subject(self) -> list[tuple[str, str, bytes]]:  # noqa: D102
        return [("suspect", "sha256", self.suspect)]

    def predicate(self) -> Fields:  # noqa: D102
        opening = self.opening
        return {
            "publish": _ref(self.publish),
            "register": _ref(self.register),
            "opening": {
                "format": OPENING_FORMAT,
                "spec": base64.b64encode(opening.spec).decode("ascii"),
                "public_key": opening.public_key.hex(),
                "signature": opening.signature.hex(),
            },
            "key": {
                "index": self.key_index,
                "salt": self.key_salt.hex(),
                "path": [step.hex() for step in self.key_path],
            },
            "head": {"salt": self.heads_salt.hex(), "sha256": [_hex(head) for head in self.heads]},
            "model": {"salt": self.model_salt.hex(), "sha256": self.model.hex()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote(StatementBase):
    """Vote: a council member's verdict on one claim.

    Only `status` and the digests are compared; the counts are for display. `millibits` is the evidence in
    thousandths of a bit, rounded down.
    """

    kind = "vote"
    claim: Ref
    suspect: bytes
    key: bytes
    status: str
    matches: int = 0
    n: int = 0
    millibits: int = 0
    bits: int = 0
    reason: str = ""

    def subject(self) -> list[tuple[str, str, bytes]]:  # noqa: D102
        return [("suspect", "sha256", self.suspect)]

    def predicate(self) -> Fields:  # noqa: D102
        return {
            "claim": _ref(self.claim),
            "key": self.key.hex(),
            "status": self.status,
            "matches": self.matches,
            "n": self.n,
            "millibits": self.millibits,
            "bits": self.bits,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit(StatementBase):
    """Exhibit: an earlier timestamped model of the accused party that may carry the claim's key as well.

    `stamp` is a register entry that lists `model`, or the party's publish entry, which `salt` then opens.
    """

    kind = "exhibit"
    claim: Ref
    stamp: Ref
    model: bytes
    salt: bytes | None

    def subject(self) -> list[tuple[str, str, bytes]]:  # noqa: D102
        return [("exhibit", "sha256", self.model)]

    def predicate(self) -> Fields:  # noqa: D102
        return {"claim": _ref(self.claim), "stamp": _ref(self.stamp), "salt": _hex(self.salt)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership(StatementBase):
    """Membership of the council, and its policy.

    The first entry of a ledger is a membership. A later one refers to its predecessor and is valid only with
    the signatures of at least the predecessor's threshold of the predecessor's members.

    Attributes:
        members: public keys in ascending order.
        threshold: votes and co-signatures required: more than half, so that two conflicting checkpoints of
            one size cannot both be confirmed by honest members.
        bits: evidence in bits from which the council accepts.
        window: seconds after the claim in which votes count.
        previous: the membership that this one replaces; None in the first entry.
    """

    kind = "membership"
    members: tuple[bytes, ...]
    threshold: int
    bits: int = 120
    window: int = 14 * 86_400
    previous: Ref | None = None

    def subject(self) -> list[tuple[str, str, bytes]]:  # noqa: D102
        message = length_prefixed(b"mtlsign/v1/council") + b"".join(map(length_prefixed, self.members))
        return [("council", "sha256", hashlib.sha256(message).digest())]

    def predicate(self) -> Fields:  # noqa: D102
        return {
            "members": [member.hex() for member in self.members],
            "threshold": self.threshold,
            "bits": self.bits,
            "window": self.window,
            "previous": None if self.previous is None else _ref(self.previous),
        }


Statement = Publish | Register | Claim | Vote | Exhibit | Membership


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


def _ref(ref: Ref) -> Fields:
    return {"index": ref.index, "leaf": ref.leaf.hex()}
