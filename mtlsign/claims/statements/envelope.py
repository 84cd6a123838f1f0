"""DSSE v1 envelopes: a payload and Ed25519 signatures over it (https://github.com/secure-systems-lab/dsse).

The payload is signed byte by byte. The envelope's own JSON has exactly one encoding; otherwise a second
ledger entry could be made from a statement that another party signed. `securesystemslib` provides the
pre-authentication encoding and the JSON form. Reading is implemented here because an untrusted envelope must
have one meaning or be rejected.
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
MAX_BRACKETS = 2 + MAX_SIGNATURES
"""Opening brackets of an envelope: the object, the list, and one object for each signature."""


@dataclass(frozen=True, slots=True)
class OpenedEnvelope:
    """Verified envelope: its payload and the public keys of its signers in ascending order."""

    payload: bytes
    signers: tuple[bytes, ...]


def sign(payload: bytes, *identities: Identity) -> bytes:
    """Return the envelope of `payload` signed by each identity.

    Raises:
        ClaimError: the envelope would be over 64 KiB.
    """
    message = Envelope(payload, PAYLOAD_TYPE, {}).pae()
    return encode(payload, ((identity.public_key, identity.sign(message)) for identity in identities))


def encode(payload: bytes, signatures: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the unique encoding of an envelope with these (public key, signature) pairs, unverified.

    Raises:
        ClaimError: the envelope is over 64 KiB, or has no signature or more than 64.
    """
    by_key = {key.hex(): Signature(key.hex(), signature.hex()) for key, signature in sorted(signatures)}
    data = json.dumps(Envelope(payload, PAYLOAD_TYPE, by_key).to_dict(), separators=(",", ":")).encode()
    if len(data) > MAX_ENVELOPE or not 1 <= len(by_key) <= MAX_SIGNATURES:
        raise ClaimError(
            f"The envelope has {len(data)} bytes and {len(by_key)} signatures. Use at most {MAX_ENVELOPE} "
            f"bytes and 1 to {MAX_SIGNATURES} signatures.",
            field="statement",
        )
    return data


def merge(*envelopes: bytes) -> bytes:
    """Return one envelope with the signatures of all `envelopes`, which were signed separately.

    Raises:
        ClaimError: an envelope is damaged, or the payloads differ.
    """
    all_signatures: dict[bytes, bytes] = {}
    payloads = set()
    for envelope in envelopes:
        payload, signatures = _read(envelope)
        payloads.add(payload)
        all_signatures.update(signatures)
    if len(payloads) != 1:
        raise ClaimError(
            "The envelopes contain different statements. Sign one and the same file.", field="statement"
        )
    return encode(payloads.pop(), all_signatures.items())


def open_envelope(data: bytes) -> OpenedEnvelope:
    """Read an untrusted envelope and verify every signature in it.

    Raises:
        ClaimError: it is not an envelope in its unique encoding, or a signature is invalid.
    """
    payload, signatures = _read(data)
    message = Envelope(payload, PAYLOAD_TYPE, {}).pae()
    for key, signature in signatures.items():
        if not is_valid_signature(key, signature, message):
            raise ClaimError(
                "The signature does not match the statement. Fetch the entry from the ledger once more.",
                field="signature",
            )
    return OpenedEnvelope(payload, tuple(signatures))


def read_payload(data: bytes) -> bytes:
    """Return the payload of an envelope without any check of its signatures.

    Raises:
        ClaimError: the bytes are not an envelope.
    """
    return _parse(data)[0]


def _read(data: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    payload, signatures = _parse(data)
    if encode(payload, signatures.items()) != data:
        raise ClaimError(
            "The envelope does not have the encoding of docs/claims.md. Pass it unchanged.", field="envelope"
        )
    return payload, signatures


def _parse(data: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    try:
        fields = require_fields(
            parse_strict_json(data, limit=MAX_ENVELOPE, where="envelope", max_brackets=MAX_BRACKETS),
            "envelope", "payload", "payloadType", "signatures",
        )  # fmt: skip
        items = fields["signatures"]
        if fields["payloadType"] != PAYLOAD_TYPE or not isinstance(items, list):
            raise ClaimError(
                f"The payloadType is not {PAYLOAD_TYPE}, or signatures is not a list. Pass the envelope "
                "unchanged.",
                field="envelope",
            )
        payload = _decode_base64(fields["payload"])
        signatures = {}
        for item in items:
            entry = require_fields(item, "signature", "keyid", "sig")
            signatures[require_hex(entry["keyid"], "signature.keyid", 32)] = _decode_base64(entry["sig"])
    except KeyMaterialError as error:
        raise ClaimError(error.detail, field=error.field) from None
    return payload, signatures


def _decode_base64(value: object) -> bytes:
    """Decode base64 with any padding, because Python 3.13 refuses padding that 3.11 accepts."""
    try:
        if not isinstance(value, str):
            raise ValueError
        digits = value.rstrip("=")
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (ValueError, binascii.Error):
        raise ClaimError(
            "The envelope contains invalid base64. Pass it unchanged.", field="envelope"
        ) from None
