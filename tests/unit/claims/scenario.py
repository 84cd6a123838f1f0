"""What the tests of claims share: published identities, openings without any network, and small claims.

PUBLISHED TEST KEYS: never use any of these identities in earnest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlsign.claims.blob_store import BlobStore
from mtlsign.claims.judging.council import run_member_round
from mtlsign.claims.judging.judge import ClaimVerifier, Finding
from mtlsign.claims.judging.lineage import DisputeResult, resolve_dispute
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.view import LedgerView, read_ledger
from mtlsign.claims.ledger.witness import Witness
from mtlsign.claims.owner import Owner, create_ledger
from mtlsign.claims.statements.types import Claim, Ref
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.kit import OwnerKit

KIT = bytes(range(32, 64))


def person(name: str) -> Identity:
    """A published identity by name."""
    return Identity(hashlib.sha256(name.encode()).digest(), hashlib.sha256(name.encode() + b" kit").digest())


ALICE, BOB = person("alice"), person("bob")


def keyed_opening(owner: Identity, nonce: str = "", **changes: Any) -> KeyOpening:
    """An opening whose reference nobody will ask for."""
    fields: dict[str, Any] = {
        "name": "test",
        "nonce": hashlib.sha256(nonce.encode()).hexdigest(),
        "n": 128,
        "carrier": qr.make_carrier(128, 1, 24, 24),
        "taps": ["layer1"],
        "head": {"kind": "keyed"},
        "statistic": "count",
        "graph": {"arch": "torchvision/resnet18", "channels": 1, "classes": 4, "width": 8, "stem": "stock"},
        "reference": hashlib.sha256(b"reference").hexdigest(),
    }
    return sign_spec(owner, make_spec(**(fields | changes)))


def claim_of(**fields: Any) -> Claim:
    """A claim with made-up references; a test overrides what it is about."""
    h = [bytes([i]) * 32 for i in range(8)]
    base: dict[str, Any] = {
        "publish": Ref(1, h[1]), "register": Ref(2, h[2]), "suspect": h[3], "opening": keyed_opening(ALICE),
        "key_index": 0, "key_salt": h[4], "key_path": (), "heads": (None,), "heads_salt": h[5], "model": h[6],
        "model_salt": h[7],
    }  # fmt: skip
    return Claim(**(base | fields))


class ByName:
    """A judge that needs no network: a model "carries" the keys whose hex its bytes name."""

    def judge(self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int) -> Finding:
        if model.startswith(b"broken"):
            return Finding("not_verifiable", reason="it is broken")
        found = claim.opening.key().hex().encode() in model
        if not found:
            return Finding("rejected", 63, 128, 1.1)
        return Finding("accepted" if head is None else "needs_commitment", 128, 128, 128.0)


@dataclass
class Clock:
    """A clock that a test sets; every look takes a second."""

    now: float = 1_790_000_000

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Town:
    """A ledger, an archive and a council of named members, all in one folder."""

    def __init__(
        self, folder: Path, members: Sequence[str] = "12345", ledger: Ledger | None = None, **council: Any
    ):
        self.folder, self.clock = folder, Clock()
        self.ledger = ledger or open_ledger(f"sqlite:///{folder}/ledger.db", create=True)
        self.archive = BlobStore.at(str(folder / "archive"))
        self.archive.put(b"reference")
        self.members = [person(name) for name in members]
        create_ledger(self.owner("founder"), [m.public_key for m in self.members], **council)

    def owner(self, who: Identity | str) -> Owner:
        identity = person(who) if isinstance(who, str) else who
        return Owner(identity, self.ledger, self.memory(identity), self.clock)

    def memory(self, who: Identity) -> Path:
        return self.folder / "witness" / f"{who.public_key.hex()[:8]}.json"

    def witness(self, who: Identity | int, ledger: Ledger | None = None) -> Witness:
        who = self.members[who] if isinstance(who, int) else who
        return Witness(who, ledger or self.ledger, self.memory(who), clock=self.clock)

    def attest(self) -> LedgerView:
        """Every member co-signs once."""
        for member in self.members:
            self.witness(member).step()
        return self.view()

    def vote(
        self, judge: ClaimVerifier | None = None, members: Sequence[Identity] | None = None
    ) -> LedgerView:
        """Every member takes part, then all co-sign."""
        for member in members or self.members:
            run_member_round(
                member,
                self.ledger,
                self.archive,
                judge or ByName(),
                memory=self.memory(member),
                clock=self.clock,
            )
        return self.attest()

    def view(self) -> LedgerView:
        return read_ledger(self.ledger)

    def dispute(self, *ids: str) -> DisputeResult:
        return resolve_dispute(self.view(), ids, self.archive, ByName())


def kit_of(
    owner: Identity, nonce: str = "", *, others: Sequence[bytes] = (), head: bytes | None = None
) -> tuple[OwnerKit, bytes]:
    """A kit and its marked model, whose bytes name the key (and `others`: keys that it inherited)."""
    changes: dict[str, Any] = {}
    if head is not None:
        changes["head"] = {"kind": "free", "hidden": 4, "features": "pooled"}
    opening = keyed_opening(owner, nonce, **changes)
    model = b"model " + opening.key().hex().encode() + b" " + b" ".join(key.hex().encode() for key in others)
    info = {"model_digest": hashlib.sha256(model).hexdigest()}
    return OwnerKit(opening, b"reference", b"w0", head, info), model
