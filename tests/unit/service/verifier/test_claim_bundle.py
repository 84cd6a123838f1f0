"""Opened claims from untrusted bytes."""

from __future__ import annotations

import base64
import copy
from functools import partial
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mtlsign.service.verifier.claim_bundle import parse_bundle, read_bundle
from mtlsign.watermark.keys.sealing import EncryptionSecret, encrypt_envelope
from tests.unit.service.fixtures import ClaimFixtures, problem_kind


def test_read_bundle_with_owner_kit_is_refused(claim_fixtures: ClaimFixtures) -> None:
    kit = encrypt_envelope(b"kit", EncryptionSecret.from_passphrase(b"x" * 8), purpose="mtlsign/v1/kit")
    assert problem_kind(lambda: read_bundle(kit)) == "kit-refused"
    for name in ("kit", "w0", "seed", "kit_key", "info"):
        assert problem_kind(partial(parse_bundle, {**claim_fixtures.right_bundle, name: 1})) == "kit-refused"


def test_parse_bundle_with_damaged_field_is_refused(claim_fixtures: ClaimFixtures) -> None:
    def changed(path: str, value: Any) -> dict[str, Any]:
        bundle = copy.deepcopy(claim_fixtures.right_bundle)
        node = bundle
        *parents, last = path.split("/")
        for name in parents:
            node = node[name]
        node[last] = value
        return bundle

    signature = claim_fixtures.right_bundle["opening"]["signature"]
    for path, value in {
        "opening/signature": signature[:-2] + ("00" if signature[-2:] != "00" else "01"),
        "opening/public_key": "00" * 32, "opening/spec": "!!", "opening/format": "x", "opening": [],
        "reference": 5,
        "head": base64.b64encode(b"x").decode(), "claim": "xyz", "more": 1,
    }.items():  # fmt: skip
        assert problem_kind(partial(parse_bundle, changed(path, value))) == "bad-bundle", path


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda b: b"PK\x03\x04" + b))
def test_read_bundle_with_random_bytes_raises_problem(data: bytes) -> None:
    assert problem_kind(lambda: read_bundle(data)) in ("bad-bundle", "kit-refused")
