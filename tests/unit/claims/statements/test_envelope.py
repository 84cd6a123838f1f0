"""Envelopes: one encoding, verified signatures, and agreement with the reference library."""

from __future__ import annotations

import base64
import json

import pytest

from mtlsign.claims.statements import envelope
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.errors import ClaimError
from tests.unit.claims.scenario import ALICE
from tests.unit.claims.statement_examples import (
    STATEMENTS,
    VOTE,
)


def test_envelope_is_verified_by_reference_library() -> None:
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


@pytest.mark.parametrize("padding", ["", "=", "==", "===", "===="])
def test_read_payload_with_any_padding_is_equal_on_every_python(padding: str) -> None:
    data = sign_statement(VOTE, ALICE)
    parsed = json.loads(data)
    other = json.dumps(parsed | {"payload": parsed["payload"].rstrip("=") + padding}).encode()
    assert envelope.read_payload(other) == base64.b64decode(parsed["payload"])


def test_open_envelope_in_another_encoding_is_refused() -> None:
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
