"""Shared objects of the claim tests: published identities, openings without a network, and small claims.

PUBLISHED TEST KEYS: never use any of these identities outside tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlsign.claims import owner as owners
from mtlsign.claims.blob_store import BlobStore
from mtlsign.claims.judging.admissibility import find_claim, inadmissibility_reasons
from mtlsign.claims.judging.council import Tally, run_member_round, tally_votes
from mtlsign.claims.judging.judge import ClaimVerifier, Finding
from mtlsign.claims.judging.lineage import DisputeResult, resolve_dispute
from mtlsign.claims.judging.standings import STANDINGS, Standing
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.view import LedgerView, read_ledger
from mtlsign.claims.ledger.witness import Witness
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Claim, Ref, Register, Statement
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.kit import OwnerKit

KIT_KEY = bytes(range(32, 64))


def make_identity(name: str) -> Identity:
    """Return the published identity of a name."""
    return Identity(hashlib.sha256(name.encode()).digest(), hashlib.sha256(name.encode() + b" kit").digest())


ALICE, BOB = make_identity("alice"), make_identity("bob")


def keyed_opening(owner: Identity, nonce: str = "", **changes: Any) -> KeyOpening:
    """Return a signed opening with a keyed head and a reference of the bytes `reference`."""
    fields: dict[str, Any] = {
        "name": "test",
        "nonce": hashlib.sha256(nonce.encode()).hexdigest(),
        "n": 128,
        "carrier": qr.make_carrier(128, 1, 24, 24),
        "taps": ["layer1"],
        "head": {"kind": "keyed"},
        "statistic": "count",
        "architecture": {
            "arch": "torchvision/resnet18",
            "channels": 1,
            "classes": 4,
            "width": 8,
            "stem": "stock",
        },
        "reference": hashlib.sha256(b"reference").hexdigest(),
    }
    return sign_spec(owner, make_spec(**(fields | changes)))


def claim_statement(**fields: Any) -> Claim:
    """Return a claim with invented references; a test overrides the fields that it is about."""
    h = [bytes([i]) * 32 for i in range(8)]
    base: dict[str, Any] = {
        "publish": Ref(1, h[1]), "register": Ref(2, h[2]), "suspect": h[3], "opening": keyed_opening(ALICE),
        "key_index": 0, "key_salt": h[4], "key_path": (), "heads": (None,), "heads_salt": h[5], "model": h[6],
        "model_salt": h[7],
    }  # fmt: skip
    return Claim(**(base | fields))


class SubstringJudge:
    """Judge without a network: a model carries the keys whose hexadecimal form its bytes contain."""

    def judge(self, claim: Claim, reference: bytes, head: bytes | None, model: bytes, bits: int) -> Finding:
        if model.startswith(b"broken"):
            return Finding("not_verifiable", reason="it is broken")
        if claim.opening.key().hex().encode() not in model:
            return Finding("rejected", 63, 128, 1.1)
        return Finding("accepted" if head is None else "needs_commitment", 128, 128, 128.0)


@dataclass
class FakeClock:
    """Clock that a test sets; it advances by one second on every call."""

    now: float = 1_790_000_000

    def __call__(self) -> float:
        self.now += 1
        return self.now


class ClaimScenario:
    """Ledger, archive and council of named members in one folder."""

    def __init__(
        self, folder: Path, members: Sequence[str] = "12345", ledger: Ledger | None = None, **council: Any
    ):
        self.folder, self.clock = folder, FakeClock()
        self.ledger = ledger or open_ledger(f"sqlite:///{folder}/ledger.db", create=True)
        self.archive = BlobStore.from_locations([str(folder / "archive")])
        self.archive.put(b"reference")
        self.members = [make_identity(name) for name in members]
        owners.create_ledger(self.owner("founder"), [m.public_key for m in self.members], **council)

    @property
    def ledger_path(self) -> Path:
        """File of the SQLite ledger."""
        return Path(self.ledger.uri.removeprefix("sqlite:///"))

    def owner(self, identity: Identity | str) -> owners.Owner:
        """Return an owner at the ledger, by identity or name."""
        identity = make_identity(identity) if isinstance(identity, str) else identity
        return owners.Owner(identity, self.ledger, self.witness_state_path(identity), self.clock)

    def witness_state_path(self, identity: Identity) -> Path:
        """Return the file of an identity's witness state."""
        return self.folder / "witness" / f"{identity.public_key.hex()[:8]}.json"

    def witness(self, member: Identity | int, ledger: Ledger | None = None) -> Witness:
        """Return the witness of a member, by identity or number."""
        member = self.members[member] if isinstance(member, int) else member
        return Witness(member, ledger or self.ledger, self.witness_state_path(member), clock=self.clock)

    def append(self, statement: Statement, *signers: Identity) -> int:
        """Sign a statement, append it without any check of its meaning, and return its index."""
        return self.ledger.append(sign_statement(statement, *signers))

    def append_registration(self, name: str, **fields: Any) -> int:
        """Append ALICE's registration of an invented model and return its index."""
        common = {"signer": ALICE.public_key, "ledger": self.view().origin, "time": int(self.clock())}
        models = ((name, make_identity(name).public_key),)
        return self.append(Register(**(common | fields), models=models), ALICE)

    def claim(self, identity: Identity, kits: Sequence[OwnerKit], suspect: bytes, **options: Any) -> str:
        """Claim a suspect model and return the claim's id."""
        return owners.claim(self.owner(identity), kits, self.archive, suspect, **options)[0].leaf.hex()

    def cosign_all(self) -> LedgerView:
        """Run one witness round of every member."""
        for member in self.members:
            self.witness(member).run_once()
        return self.view()

    def run_member(self, member: Identity, judge: ClaimVerifier | None = None) -> None:
        """Run one council round of a member."""
        run_member_round(
            member,
            self.ledger,
            self.archive,
            judge or SubstringJudge(),
            witness_state=self.witness_state_path(member),
            clock=self.clock,
        )

    def run_council(
        self, judge: ClaimVerifier | None = None, members: Sequence[Identity] | None = None
    ) -> LedgerView:
        """Run one council round of every member, then let all members co-sign."""
        for member in members or self.members:
            self.run_member(member, judge)
        return self.cosign_all()

    def view(self) -> LedgerView:
        """Return the current view of the ledger."""
        return read_ledger(self.ledger)

    def tally(self, name: str) -> Tally:
        """Return the tally of a claim."""
        view = self.view()
        return tally_votes(view, *find_claim(view, name))

    def inadmissibility_codes(self, name: str) -> list[str]:
        """Return the codes of all reasons against a claim."""
        view = self.view()
        return [reason.code for reason in inadmissibility_reasons(view, *find_claim(view, name))]

    def dispute(self, *ids: str) -> DisputeResult:
        """Resolve a dispute between claims."""
        return resolve_dispute(self.view(), ids, self.archive, SubstringJudge())

    def standing(self, name: str, *rivals: str) -> Standing:
        """Return the standing of a claim in a dispute, and check the form of all standings."""
        result = self.dispute(name, *rivals)
        assert {standing.standing for standing in result.standings} <= set(STANDINGS)
        assert all(s.sentence.endswith(".") and "{" not in s.sentence for s in result.standings)
        result.to_json()
        return result.standings[0]


def kit_and_model(
    owner: Identity, nonce: str = "", *, inherited: Sequence[bytes] = (), head: bytes | None = None
) -> tuple[OwnerKit, bytes]:
    """Return a kit and its marked model, whose bytes contain the key and the `inherited` keys."""
    changes: dict[str, Any] = {}
    if head is not None:
        changes["head"] = {"kind": "free", "hidden": 4, "features": "pooled"}
    opening = keyed_opening(owner, nonce, **changes)
    inherited_hex = b" ".join(key.hex().encode() for key in inherited)
    model = b"model " + opening.key().hex().encode() + b" " + inherited_hex
    info = {"model_digest": hashlib.sha256(model).hexdigest()}
    return OwnerKit(opening, b"reference", b"w0", head, info), model
