"""Statements and envelopes: what is written reads back, and anything else is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from mtlsign.claims import merkle
from mtlsign.claims.statements import commitments, envelope
from mtlsign.claims.statements.parsing import open_statement, parse, sign_statement
from mtlsign.claims.statements.types import Exhibit, Membership, Publish, Ref, Register, Statement, Vote
from mtlsign.errors import ClaimError
from mtlsign.watermark.keys.identity import Identity
from tests.unit.claims.scenario import ALICE, BOB, KIT, claim_of, keyed_opening

H = [bytes([i]) * 32 for i in range(16)]
WHO: dict[str, Any] = {"signer": ALICE.public_key, "ledger": H[0], "time": 1_790_000_000}
MEMBERS = tuple(sorted((ALICE.public_key, BOB.public_key)))
STATEMENTS: list[Statement] = [
    Publish(**WHO, nonce=H[1], keys_root=H[2], keys_count=3, heads=H[3], model=H[4], licence="MIT",
            recipient="Ω"),
    Register(**WHO, models=(("a", H[1]), ("a", H[2]))),
    claim_of(**WHO),
    Vote(**WHO, claim=Ref(7, H[1]), suspect=H[2], key=H[3], status="accepted", matches=1024, n=1024,
         millibits=1_024_000, bits=120),
    Exhibit(**WHO, claim=Ref(7, H[1]), stamp=Ref(2, H[2]), model=H[3], salt=None),
    Membership(signer=ALICE.public_key, ledger=None, time=0, members=MEMBERS, threshold=2),
    Membership(**WHO, members=MEMBERS, threshold=2, previous=Ref(0, H[0])),
]  # fmt: skip


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: s.kind)
def test_there_and_back(statement: Statement) -> None:
    data = sign_statement(statement, ALICE)
    assert (
        open_statement(data) == (statement, (ALICE.public_key,)) and parse(statement.payload()) == statement
    )
    assert len(data) <= envelope.MAX_ENVELOPE and sign_statement(statement, ALICE) == data


def test_the_reference_library_verifies_our_envelopes() -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

    data = json.loads(sign_statement(STATEMENTS[1], ALICE))
    assert data["payloadType"] == "application/vnd.in-toto+json"
    public = ALICE.public_key.hex()
    key = SSlibKey(public, "ed25519", "ed25519", {"public": public})
    assert list(Envelope.from_dict(data).verify([key], 1)) == [public]
    statement = json.loads(base64.b64decode(data["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1" and statement["predicateType"].startswith(
        "urn:"
    )


def edit(statement: Statement, **changes: Any) -> bytes:
    whole = json.loads(statement.payload())
    for path, value in changes.items():
        at = whole
        *parents, name = path.split("__")
        for parent in parents:
            at = at[int(parent)] if isinstance(at, list) else at[parent]
        if value is ...:
            del at[name]
        else:
            at[name] = value
    return json.dumps(whole, ensure_ascii=False).encode()


PUBLISH, REGISTER, CLAIM, VOTE, EXHIBIT, FOUNDING, CHANGE = STATEMENTS
BAD: dict[str, bytes] = {
    "kind swapped": edit(VOTE, predicateType="urn:mtlsign:v0:exhibit"),
    "kind unknown": edit(VOTE, predicateType="urn:mtlsign:v1:vote"),
    "kind with the prefix twice": edit(VOTE, predicateType="urn:mtlsign:v0:urn:mtlsign:v0:vote"),
    "not in-toto": edit(VOTE, _type="https://in-toto.io/Statement/v0.1"),
    "no ledger": edit(VOTE, predicate__ledger=None),
    "field missing": edit(VOTE, predicate__bits=...),
    "field unknown": edit(VOTE, predicate__owner="me"),
    "float": edit(VOTE, predicate__millibits=1.0),
    "bool": edit(VOTE, predicate__n=True),
    "negative": edit(VOTE, predicate__matches=-1),
    "status": edit(VOTE, predicate__status="Accepted"),
    "subject lies": edit(FOUNDING, subject__0__digest={"sha256": "00" * 32}),
    "subject's algorithm": edit(VOTE, subject__0__digest={"sha1": "00" * 32}),
    "subject's name": edit(VOTE, subject__0__name="owner"),
    "two subjects": edit(VOTE, subject=[{"name": "suspect", "digest": {"sha256": "00" * 32}}] * 2),
    "no subject": edit(REGISTER, subject=[]),
    "registered twice": edit(REGISTER, subject=[{"name": "a", "digest": {"sha256": "00" * 32}}] * 2),
    "bidi in a name": edit(REGISTER, subject=[{"name": "a\u202eb", "digest": {"sha256": "00" * 32}}]),
    "zero width in a licence": edit(PUBLISH, predicate__licence="M\u200bIT"),
    "upper-case hex": edit(PUBLISH, predicate__nonce="AB" * 32),
    "small-order signer": edit(VOTE, predicate__signer="01" + "00" * 31),
    "non-canonical signer": edit(VOTE, predicate__signer="ff" * 31 + "7f"),
    "threshold not over half": edit(FOUNDING, predicate__threshold=1),
    "threshold over all": edit(FOUNDING, predicate__threshold=3),
    "members twice": edit(FOUNDING, predicate__members=[ALICE.public_key.hex()] * 2),
    "members out of order": edit(FOUNDING, predicate__members=[m.hex() for m in reversed(MEMBERS)]),
    "small-order member": edit(FOUNDING, predicate__members=["01" + "00" * 31], predicate__threshold=1),
    "founding with a past": edit(FOUNDING, predicate__previous={"index": 0, "leaf": "00" * 32}),
    "change without a past": edit(CHANGE, predicate__previous=None),
    "duplicate field": VOTE.payload().replace(b'"time":', b'"time":1,"time":', 1),
    "duplicate by escape": VOTE.payload().replace(b'"time":', b'"\\u0074ime":1,"time":', 1),
    "byte order mark": b"\xef\xbb\xbf" + VOTE.payload(),
    "trailing": VOTE.payload() + b"{}",
    "too long": VOTE.payload() + b" " * 50_000,
    "opening's format": edit(CLAIM, predicate__opening__format="x"),
    "a long path": edit(CLAIM, predicate__key__path=["00" * 32] * 9),
    "a list": b"[]",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_statement_is_refused(name: str) -> None:
    with pytest.raises(ClaimError) as caught:
        parse(BAD[name])
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    with pytest.raises(ClaimError):  # also when properly signed
        open_statement(envelope.sign(BAD[name], ALICE))


def test_who_signs_is_who_speaks() -> None:
    payload = VOTE.payload()
    for signers in ((BOB,), (ALICE, BOB)):
        with pytest.raises(ClaimError, match="signature"):
            open_statement(envelope.sign(payload, *signers))
    both = envelope.merge(envelope.sign(CHANGE.payload(), ALICE), envelope.sign(CHANGE.payload(), BOB))
    assert open_statement(both)[1] == MEMBERS and both == envelope.sign(CHANGE.payload(), BOB, ALICE)
    with pytest.raises(ClaimError, match="different statements"):
        envelope.merge(envelope.sign(CHANGE.payload(), ALICE), envelope.sign(payload, BOB))


def test_an_envelope_has_one_spelling() -> None:
    data = sign_statement(VOTE, ALICE)
    parsed = json.loads(data)
    twice = dict(parsed, signatures=parsed["signatures"] * 2)
    extra = dict(parsed, signatures=[dict(parsed["signatures"][0], cert="x")])
    for other in (
        data + b"\n", b" " + data, json.dumps(parsed).encode(), json.dumps(parsed, indent=1).encode(),
        json.dumps(dict(reversed(parsed.items())), separators=(",", ":")).encode(),
        json.dumps(twice, separators=(",", ":")).encode(), json.dumps(extra, separators=(",", ":")).encode(),
        json.dumps(dict(parsed, payload=parsed["payload"] + "="), separators=(",", ":")).encode(),
        json.dumps(dict(parsed, payloadType="text/plain"), separators=(",", ":")).encode(),
        json.dumps(dict(parsed, signatures=[]), separators=(",", ":")).encode(),
        b"{}", b"", b"null", b"[" * 70,
    ):  # fmt: skip
        with pytest.raises(ClaimError):
            envelope.open_envelope(other)


def test_a_large_opening_fits_a_claim() -> None:
    big = keyed_opening(ALICE, taps=[f"t{i}." + "x" * 150 for i in range(16)], name="n" * 128)
    path = [commitments.commit_key(bytes(32), b"%032d" % i) for i in range(256)]
    claim = claim_of(**WHO, opening=big, key_path=tuple(commitments.key_path(path, 5)), heads=(None,) * 256)
    assert len(sign_statement(claim, ALICE)) < envelope.MAX_ENVELOPE


def test_hiding_binds_kind_salt_and_every_part() -> None:
    base = commitments.commit("key", H[1], b"ab", b"c")
    others = [("key", H[1], b"a", b"bc"), ("key", H[1], b"abc"), ("keyab", H[1], b"c"),
              ("key", H[2], b"ab", b"c"), ("model", H[1], b"ab", b"c"),
              ("key", H[1], b"ab", b"c", b"")]  # fmt: skip
    assert len({base, *(commitments.commit(*other) for other in others)}) == len(others) + 1
    with pytest.raises(ValueError):
        commitments.commit("key", b"short", b"x")
    salts = {
        commitments.derive_salt(KIT, H[1], kind, about) for kind in ("key", "model") for about in (H[2], H[3])
    }
    assert len(salts) == 4 and commitments.derive_salt(KIT, H[2], "key", H[2]) not in salts
    hidden = [commitments.commit_key(h, h) for h in H[:5]]
    for i, one in enumerate(hidden):
        path = commitments.key_path(hidden, i)
        assert merkle.verify_inclusion(merkle.leaf_hash(one), i, 5, path, commitments.keys_root(hidden))


def test_an_identity_of_small_order_cannot_vote() -> None:
    assert Identity(bytes(32), bytes(32)).public_key  # an honest key, for contrast
    with pytest.raises(ClaimError, match="small order"):
        parse(BAD["small-order signer"])
