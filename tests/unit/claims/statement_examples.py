"""One example of each statement kind, shared by the claim tests."""

from __future__ import annotations

from typing import Any

from mtlsign.claims.statements.types import Exhibit, Membership, Publish, Ref, Register, Statement, Vote
from tests.unit.claims.scenario import ALICE, BOB, claim_statement

H = [bytes([i]) * 32 for i in range(16)]


COMMON: dict[str, Any] = {"signer": ALICE.public_key, "ledger": H[0], "time": 1_790_000_000}


MEMBERS = tuple(sorted((ALICE.public_key, BOB.public_key)))


STATEMENTS: list[Statement] = [
    Publish(**COMMON, nonce=H[1], keys_root=H[2], keys_count=3, heads=H[3], model=H[4], licence="MIT",
            recipient="Ω"),
    Register(**COMMON, models=(("a", H[1]), ("a", H[2]))),
    claim_statement(**COMMON),
    Vote(**COMMON, claim=Ref(7, H[1]), suspect=H[2], key=H[3], status="accepted", matches=1024, n=1024,
         millibits=1_024_000, bits=120),
    Exhibit(**COMMON, claim=Ref(7, H[1]), stamp=Ref(2, H[2]), model=H[3], salt=None),
    Membership(signer=ALICE.public_key, ledger=None, time=0, members=MEMBERS, threshold=2),
    Membership(**COMMON, members=MEMBERS, threshold=2, previous=Ref(0, H[0])),
]  # fmt: skip


PUBLISH, REGISTER, CLAIM, VOTE, EXHIBIT, CREATION, CHANGE = STATEMENTS
