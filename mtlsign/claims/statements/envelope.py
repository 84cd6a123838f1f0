"""DSSE envelopes: who signed which bytes (https://github.com/secure-systems-lab/dsse, v1).

The payload is signed as it is. The envelope's own JSON has one spelling only, so that nobody can make a
second ledger entry out of somebody else's signed statement. `securesystemslib` gives the pre-authentication
encoding and the JSON form; reading is ours, because a stranger's envelope must mean one thing or nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import dataclass

from securesystemslib.dsse import Envelope
from securesystemslib.signer import Signature  # type: ignore[attr-defined]  # re-exported without __all__

from mtlsign.errors import ClaimError, KeyMaterialError
from mtlsign.storage.strict_json import parse_strict_json, require_fields, require_hex
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import is_valid_signature

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_ENVELOPE = 64 * 1024
MAX_SIGNATURES = 64


@dataclass(frozen=True, slots=True)
class Opened:
    """A checked envelope: its payload and the public keys whose signatures hold, in rising order."""

    payload: bytes
    signers: tuple[bytes, ...]


def sign(payload: bytes, *identities: Identity) -> bytes:
    """The envelope of a payload, signed by each identity. Raises ClaimError when it would be over 64 KiB."""
    message = Envelope(payload, PAYLOAD_TYPE, {}).pae()
    return encode(payload, ((identity.public_key, identity.sign(message)) for identity in identities))


def encode(payload: bytes, signatures: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The one spelling of an envelope with these (public key, signature) pairs; nothing is verified."""
    found = {key.hex(): Signature(key.hex(), signature.hex()) for key, signature in sorted(signatures)}
    data = json.dumps(Envelope(payload, PAYLOAD_TYPE, found).to_dict(), separators=(",", ":")).encode()
    if len(data) > MAX_ENVELOPE or not 1 <= len(found) <= MAX_SIGNATURES:
        raise ClaimError(
            f"takes {len(data)} bytes and {len(found)} signatures; {MAX_ENVELOPE} and {MAX_SIGNATURES} "
            "are allowed: say less",
            field="statement",
        )
    return data


def merge(*envelopes: bytes) -> bytes:
    """One envelope with the signatures of all: several members sign one payload apart.

    Raises:
        ClaimError: one of them is damaged, or their payloads differ.
    """
    found: dict[bytes, bytes] = {}
    payloads = set()
    for envelope in envelopes:
        payload, signatures = _read(envelope)
        payloads.add(payload)
        found.update(signatures)
    if len(payloads) != 1:
        raise ClaimError("hold different statements; sign one and the same file", field="statement")
    return encode(payloads.pop(), found.items())


def open_envelope(data: bytes) -> Opened:
    """Read an envelope from anywhere and check every signature in it.

    Raises:
        ClaimError: it is not one well-formed envelope in its one spelling, or any signature does not hold.
    """
    payload, signatures = _read(data)
    message = Envelope(payload, PAYLOAD_TYPE, {}).pae()
    for key, signature in signatures.items():
        if not is_valid_signature(key, signature, message):
            raise ClaimError(
                "does not fit the statement; take the entry from the ledger again", field="signature"
            )
    return Opened(payload, tuple(signatures))


def _read(data: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    try:
        got = require_fields(
            parse_strict_json(data, limit=MAX_ENVELOPE, where="envelope"),
            "envelope", "payload", "payloadType", "signatures",
        )  # fmt: skip
        listed = got["signatures"]
        if got["payloadType"] != PAYLOAD_TYPE or not isinstance(listed, list):
            raise ClaimError(f"payloadType must be {PAYLOAD_TYPE}, signatures a list", field="envelope")
        payload = _base64(got["payload"])
        signatures = {}
        for item in listed:
            one = require_fields(item, "signature", "keyid", "sig")
            signatures[require_hex(one["keyid"], "signature.keyid", 32)] = _base64(one["sig"])
    except KeyMaterialError as error:
        raise ClaimError(str(error)) from None
    if encode(payload, signatures.items()) != data:
        raise ClaimError("is not spelled as docs/claims.md says; pass it as it was written", field="envelope")
    return payload, signatures


def _base64(value: object) -> bytes:
    try:
        if not isinstance(value, str):
            raise ValueError
        return base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        raise ClaimError("is not base64; pass the envelope as it was written", field="envelope") from None
