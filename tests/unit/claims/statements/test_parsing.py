"""Parsing of statements: written statements are read back, and all other payloads are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mtlsign.claims.statements import commitments, envelope
from mtlsign.claims.statements.parsing import open_statement, parse, sign_statement
from mtlsign.claims.statements.types import Statement
from mtlsign.errors import ClaimError
from mtlsign.watermark.keys.identity import Identity
from tests.unit.claims.scenario import ALICE, BOB, claim_statement, keyed_opening
from tests.unit.claims.statement_examples import (
    CHANGE,
    CLAIM,
    COMMON,
    CREATION,
    MEMBERS,
    PUBLISH,
    REGISTER,
    STATEMENTS,
    VOTE,
)


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: s.kind)
def test_open_statement_of_signed_statement_returns_it(statement: Statement) -> None:
    data = sign_statement(statement, ALICE)
    assert (
        open_statement(data) == (statement, (ALICE.public_key,)) and parse(statement.payload()) == statement
    )
    assert len(data) <= envelope.MAX_ENVELOPE and sign_statement(statement, ALICE) == data


def edited(statement: Statement, **changes: Any) -> bytes:
    document = json.loads(statement.payload())
    for path, value in changes.items():
        target = document
        *parents, name = path.split("__")
        for parent in parents:
            target = target[int(parent)] if isinstance(target, list) else target[parent]
        if value is ...:
            del target[name]
        else:
            target[name] = value
    return json.dumps(document, ensure_ascii=False).encode()


INVALID: dict[str, bytes] = {
    "kind swapped": edited(VOTE, predicateType="urn:mtlsign:v1:exhibit"),
    "kind unknown": edited(VOTE, predicateType="urn:mtlsign:v2:vote"),
    "kind with the prefix twice": edited(VOTE, predicateType="urn:mtlsign:v1:urn:mtlsign:v1:vote"),
    "not in-toto": edited(VOTE, _type="https://in-toto.io/Statement/v0.1"),
    "no ledger": edited(VOTE, predicate__ledger=None),
    "field missing": edited(VOTE, predicate__bits=...),
    "field unknown": edited(VOTE, predicate__owner="me"),
    "float": edited(VOTE, predicate__millibits=1.0),
    "bool": edited(VOTE, predicate__n=True),
    "negative": edited(VOTE, predicate__matches=-1),
    "status": edited(VOTE, predicate__status="Accepted"),
    "subject contradicts predicate": edited(CREATION, subject__0__digest={"sha256": "00" * 32}),
    "subject's algorithm": edited(VOTE, subject__0__digest={"sha1": "00" * 32}),
    "subject's name": edited(VOTE, subject__0__name="owner"),
    "two subjects": edited(VOTE, subject=[{"name": "suspect", "digest": {"sha256": "00" * 32}}] * 2),
    "no subject": edited(REGISTER, subject=[]),
    "registered twice": edited(REGISTER, subject=[{"name": "a", "digest": {"sha256": "00" * 32}}] * 2),
    "bidi in a name": edited(REGISTER, subject=[{"name": "a\u202eb", "digest": {"sha256": "00" * 32}}]),
    "zero width in a licence": edited(PUBLISH, predicate__licence="M\u200bIT"),
    "upper-case hex": edited(PUBLISH, predicate__nonce="AB" * 32),
    "small-order signer": edited(VOTE, predicate__signer="01" + "00" * 31),
    "non-canonical signer": edited(VOTE, predicate__signer="ff" * 31 + "7f"),
    "threshold not over half": edited(CREATION, predicate__threshold=1),
    "threshold over all": edited(CREATION, predicate__threshold=3),
    "members twice": edited(CREATION, predicate__members=[ALICE.public_key.hex()] * 2),
    "members out of order": edited(CREATION, predicate__members=[m.hex() for m in reversed(MEMBERS)]),
    "small-order member": edited(CREATION, predicate__members=["01" + "00" * 31], predicate__threshold=1),
    "creation with a predecessor": edited(CREATION, predicate__previous={"index": 0, "leaf": "00" * 32}),
    "change without a predecessor": edited(CHANGE, predicate__previous=None),
    "duplicate field": VOTE.payload().replace(b'"time":', b'"time":1,"time":', 1),
    "duplicate by escape": VOTE.payload().replace(b'"time":', b'"\\u0074ime":1,"time":', 1),
    "byte order mark": b"\xef\xbb\xbf" + VOTE.payload(),
    "trailing": VOTE.payload() + b"{}",
    "too long": VOTE.payload() + b" " * 50_000,
    "opening's format": edited(CLAIM, predicate__opening__format="x"),
    "a long path": edited(CLAIM, predicate__key__path=["00" * 32] * 9),
    "a list": b"[]",
    "nothing": b"",
}


@pytest.mark.parametrize("name", INVALID)
def test_parse_of_invalid_statement_is_refused(name: str) -> None:
    with pytest.raises(ClaimError) as caught:
        parse(INVALID[name])
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    with pytest.raises(ClaimError):  # even if it is properly signed
        open_statement(envelope.sign(INVALID[name], ALICE))


def test_open_statement_signed_by_other_identities_is_refused() -> None:
    payload = VOTE.payload()
    for signers in ((BOB,), (ALICE, BOB)):
        with pytest.raises(ClaimError, match="signature"):
            open_statement(envelope.sign(payload, *signers))
    both = envelope.merge(envelope.sign(CHANGE.payload(), ALICE), envelope.sign(CHANGE.payload(), BOB))
    assert open_statement(both)[1] == MEMBERS and both == envelope.sign(CHANGE.payload(), BOB, ALICE)
    with pytest.raises(ClaimError, match="different statements"):
        envelope.merge(envelope.sign(CHANGE.payload(), ALICE), envelope.sign(payload, BOB))


def test_sign_statement_with_large_opening_fits_into_an_envelope() -> None:
    big = keyed_opening(ALICE, taps=[f"t{i}." + "x" * 150 for i in range(16)], name="n" * 128)
    path = [commitments.commit_key(bytes(32), b"%032d" % i) for i in range(256)]
    claim = claim_statement(
        **COMMON, opening=big, key_path=tuple(commitments.key_path(path, 5)), heads=(None,) * 256
    )
    assert len(sign_statement(claim, ALICE)) < envelope.MAX_ENVELOPE


def test_parse_with_signer_of_small_order_is_refused() -> None:
    assert Identity(bytes(32), bytes(32)).public_key  # a valid key, for contrast
    with pytest.raises(ClaimError, match="small order"):
        parse(INVALID["small-order signer"])
