"""The six statements, as in-toto Statements v1: what an owner, a member or an accused party says.

Each is a frozen value with `payload()`; `parsing` reads them back from anywhere. A statement names its author
and, but for the first of a ledger, its ledger, so it can neither be presented as another kind nor carried
elsewhere. `time` is the author's clock: information, never evidence.
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
PREDICATE = "urn:mtlsign:v0:"
VOTES = ("accepted", "rejected", "needs_commitment", "not_verifiable", "inadmissible")

Fields = dict[str, object]


@dataclass(frozen=True, slots=True)
class Ref:
    """An earlier entry of the same ledger: its number and the hash of its bytes. Both must be right."""

    index: int
    leaf: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What all share: the author's public key, the ledger's origin (None: founds one), the author's clock."""

    kind: ClassVar[str]
    signer: bytes
    ledger: bytes | None
    time: int

    def subject(self) -> list[tuple[str, str, bytes]]:
        """(name, digest algorithm, digest) of what the statement is about."""
        raise NotImplementedError

    def predicate(self) -> Fields:
        """The kind's own fields, JSON-ready."""
        raise NotImplementedError

    def payload(self) -> bytes:
        """The exact bytes to sign; raises ClaimError for what JSON cannot say. `parsing.seal` checks the
        rest.
        """
        common: Fields = {"signer": self.signer.hex(), "ledger": _hex(self.ledger), "time": self.time}
        whole = {
            "_type": STATEMENT,
            "subject": [
                {"name": name, "digest": {algorithm: d.hex()}} for name, algorithm, d in self.subject()
            ],
            "predicateType": PREDICATE + self.kind,
            "predicate": common | self.predicate(),
        }
        try:
            data = json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError):
            raise ClaimError(
                "holds something that JSON cannot say; give text and integers", field=self.kind
            ) from None
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish(Base):
    """⟨time ‖ hash(key) ‖ hash(c_WM) ‖ hash(info)⟩ of the paper and a hiding hash of the marked model.

    `info` is the digest of the spec, which is already hashed into each key. All four hashes are `hiding`'s.
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
        return [("marked model", "mtlsignHidingV0", self.model)]

    def predicate(self) -> Fields:  # noqa: D102
        return {
            "nonce": self.nonce.hex(),
            "keys": {"root": self.keys_root.hex(), "count": self.keys_count},
            "head": self.heads.hex(),
            "licence": self.licence,
            "recipient": self.recipient,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Register(Base):
    """Models seen in the world, by digest, stamped before any key is opened against them."""

    kind = "register"
    models: tuple[tuple[str, bytes], ...]

    def subject(self) -> list[tuple[str, str, bytes]]:  # noqa: D102
        return [(name, "sha256", digest) for name, digest in self.models]

    def predicate(self) -> Fields:  # noqa: D102
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(Base):
    """⟨l_M ‖ hash(M) ‖ l_cWM ‖ key⟩ of the paper: one key opened against one registered model.

    Pointers are digests: a reader looks them up in archives that its operator named, never where a claim
    says.
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
class Vote(Base):
    """A member's own verdict on one claim. Only `status` and the digests are compared; the counts are shown.

    `millibits` is the evidence in thousandths of a bit, rounded down.
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
class Exhibit(Base):
    """An accused party's model, stamped earlier, on which the claim's key is said to pass as well.

    `stamp` is a register entry that lists `model`, or the party's own publish entry; then `salt` opens it.
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
class Membership(Base):
    """A council: who, how many of them decide, from how many bits, within how many seconds.

    The first of a ledger is its origin. Each later one names the one before and counts only when at least the
    then threshold of the then members signed it. `threshold` is more than half: two heads cannot both count.
    """

    kind = "membership"
    members: tuple[bytes, ...]
    threshold: int
    bits: int = 120
    window: int = 14 * 86_400
    previous: Ref | None = None

    def subject(self) -> list[tuple[str, str, bytes]]:  # noqa: D102
        whole = length_prefixed(b"mtlsign/v0/council") + b"".join(map(length_prefixed, self.members))
        return [("council", "sha256", hashlib.sha256(whole).digest())]

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
