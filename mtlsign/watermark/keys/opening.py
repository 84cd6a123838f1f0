"""Owner identity → watermark key → keystreams (π, l, p): design decisions 1 and 2, `docs/format.md`.

An `Identity` signs a spec; spec, public key and signature together are a `KeyOpening`; their hash is the key;
the key alone fixes the integers π, the labels l and the keyed head's signs p. An opening is secret until a
claim reveals it; a revealed key is spent. An identity's private half never leaves the process that loaded it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mtlsign.errors import KeyMaterialError
from mtlsign.storage.strict_json import parse_strict_json, raise_invalid, require_fields, require_hex
from mtlsign.watermark.keys.identity import (
    Identity,
    length_prefixed,
    load_or_create_identity,
    read_passphrase,
)
from mtlsign.watermark.keys.spec import (
    MAX_SPEC_BYTES,
    Carrier,
    Head,
    Spec,
    decimal_digits,
    m_bits,
    make_spec,
    parse_spec,
)

__all__ = [
    "Carrier",
    "Head",
    "Identity",
    "KeyOpening",
    "Spec",
    "check_public_key",
    "decimal_digits",
    "head_signs",
    "is_valid_signature",
    "keystream",
    "load_or_create_identity",
    "m_bits",
    "make_spec",
    "parse_spec",
    "read_passphrase",
    "sign_spec",
    "watermark_integers",
    "watermark_labels",
]

OPENING_FORMAT = "mtlsign/key-opening/v0"
MAX_OPENING_BYTES = 32 * 1024

_P = 2**255 - 19
_L = 2**252 + 27742317777372353535851937790883648493
_Y8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
# The y of the 8 points of order 1, 4 (0: two points), 2 and 8 (four points); the test derives the last two.
_SMALL_ORDER_Y = frozenset({1, 0, _P - 1, _Y8, _P - _Y8})


def _check_public_key(public_key: bytes) -> None:
    if len(public_key) != 32:
        raise KeyMaterialError("must be 32 bytes; pass the opening as MTLSign wrote it", field="public_key")
    y = int.from_bytes(public_key, "little") & (2**255 - 1)
    if y >= _P or y in _SMALL_ORDER_Y:
        raise KeyMaterialError(
            "is of small order or not canonical and so binds nobody; use a key of Identity.generate",
            field="public_key",
        )


def is_valid_signature(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether an Ed25519 signature holds by the rules of `docs/format.md`, section "Key".

    False too for a public key that is of small order or not canonical, and for a signature that is not 64
    bytes or whose S is not below the group's order.
    """
    try:
        _check_public_key(public_key)
        if len(signature) != 64 or int.from_bytes(signature[32:], "little") >= _L:
            return False
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, KeyMaterialError, ValueError):
        return False
    return True


def check_public_key(public_key: bytes) -> None:
    """Raises KeyMaterialError for a public key that is not 32 bytes, not canonical or of small order."""
    _check_public_key(public_key)


def _signed_message(spec: bytes, public_key: bytes) -> bytes:
    return b"mtlsign/v0/spec" + length_prefixed(spec) + length_prefixed(public_key)


@dataclass(frozen=True, slots=True)
class KeyOpening:
    """(spec, public key, signature): the only form in which a key is stored, sent or revealed.

    Whoever holds it can compute the key, so the spec and the signature stay out of `repr`.
    """

    spec: bytes = field(repr=False)
    public_key: bytes
    signature: bytes = field(repr=False)

    def parse(self) -> Spec:
        """The checked spec; raises KeyMaterialError like `parse_spec`."""
        return parse_spec(self.spec)

    def key(self) -> bytes:
        """The watermark key, 32 bytes, after every check of `docs/format.md`, section "Key".

        Raises:
            KeyMaterialError: bad spec, small-order or non-canonical public key, or wrong signature.
        """
        parse_spec(self.spec)
        _check_public_key(self.public_key)
        message = _signed_message(self.spec, self.public_key)
        try:
            if len(self.signature) != 64 or int.from_bytes(self.signature[32:], "little") >= _L:
                raise InvalidSignature
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(self.signature, message)
        except (InvalidSignature, ValueError):
            raise KeyMaterialError(
                "does not fit the spec and the public key; pass the opening as MTLSign wrote it",
                field="signature",
            ) from None
        whole = (
            b"mtlsign/v0/key"
            + length_prefixed(self.spec)
            + length_prefixed(self.public_key)
            + length_prefixed(self.signature)
        )
        return hashlib.sha256(whole).digest()

    def to_json(self) -> str:
        """The opening as JSON text (section "Key opening"). Secret until the claim."""
        fields = {
            "format": OPENING_FORMAT,
            "spec": base64.b64encode(self.spec).decode("ascii"),
            "public_key": self.public_key.hex(),
            "signature": self.signature.hex(),
        }
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, data: bytes | str) -> KeyOpening:
        """Read at most 32 KiB of JSON; signature, public key and spec are checked by `key`.

        Raises:
            KeyMaterialError: the bytes are not one well-formed opening; nothing else is ever raised.
        """
        where = "opening"
        raw = data.encode("utf-8", "replace") if isinstance(data, str) else bytes(data)
        parsed = parse_strict_json(raw, limit=MAX_OPENING_BYTES, where=where)
        got = require_fields(parsed, where, "format", "spec", "public_key", "signature")
        if got["format"] != OPENING_FORMAT:
            raise_invalid("opening.format", f"must be {OPENING_FORMAT}")
        text = got["spec"]
        try:
            if not isinstance(text, str):
                raise ValueError
            spec = base64.b64decode(text, validate=True)
            if len(spec) > MAX_SPEC_BYTES or base64.b64encode(spec).decode("ascii") != text:
                raise ValueError
        except (ValueError, binascii.Error):
            raise KeyMaterialError(
                "must be a spec in canonical base64; pass the opening as MTLSign wrote it",
                field="opening.spec",
            ) from None
        return cls(
            spec=spec,
            public_key=require_hex(got["public_key"], "opening.public_key", 32),
            signature=require_hex(got["signature"], "opening.signature", 64),
        )


def sign_spec(identity: Identity, spec: bytes) -> KeyOpening:
    """Sign a spec's exact bytes; raises KeyMaterialError when `parse_spec` refuses them."""
    raw = parse_spec(spec).raw
    return KeyOpening(raw, identity.public_key, identity.sign(_signed_message(raw, identity.public_key)))


def _keystream_bits(key: bytes, label: bytes, count: int) -> npt.NDArray[np.uint8]:
    """First `count` keystream bits under HKDF-SHA256(key, label), MSB of each byte first, as 0/1."""
    if not isinstance(key, bytes) or len(key) != 32:
        raise KeyMaterialError("must be 32 bytes; compute it with KeyOpening.key", field="key")
    subkey = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=label).derive(key)
    encryptor = Cipher(algorithms.ChaCha20(subkey, bytes(16)), mode=None).encryptor()
    stream = np.frombuffer(encryptor.update(bytes((count + 7) // 8)), dtype=np.uint8)
    return np.unpackbits(stream, count=count)


def keystream(key: bytes, label: bytes, size: int) -> bytes:
    """First `size` bytes of the ChaCha20 stream under HKDF-SHA256(key, label), for what else a key fixes."""
    return np.packbits(_keystream_bits(key, label, 8 * size)).tobytes()


def watermark_integers(key: bytes, n: int) -> npt.NDArray[np.int64]:
    """π: the first n distinct m-bit integers of its keystream, int64 [n], m = 3·⌈log2 n⌉ (paper §3.2)."""
    if not 2 <= n <= 65536:
        raise ValueError(f"n must be from 2 to 65536, got {n}")
    m = m_bits(n)
    powers = np.left_shift(np.int64(1), np.arange(m - 1, -1, -1, dtype=np.int64))
    drawn = n + 16
    while True:
        values = _keystream_bits(key, b"mtlsign/v0/integers", drawn * m).reshape(drawn, m) @ powers
        first = np.sort(np.unique(values, return_index=True)[1])
        if len(first) >= n:
            return np.asarray(values[first[:n]], dtype=np.int64)
        drawn *= 2


def watermark_labels(key: bytes, n: int) -> npt.NDArray[np.uint8]:
    """l: the first n bits of their own keystream, uint8 [n] of 0 and 1 (paper §3.2)."""
    if not 1 <= n <= 65536:
        raise ValueError(f"n must be from 1 to 65536, got {n}")
    return _keystream_bits(key, b"mtlsign/v0/labels", n)


def head_signs(key: bytes, d: int, readout: int = 0) -> npt.NDArray[np.int8]:
    """Signs of the keyed head, int8 [d] of +1 (bit 1) and -1 (bit 0); p = signs/√d (design decision 1)."""
    if not 1 <= d <= 2**28 or readout < 0:
        raise ValueError(f"d must be from 1 to 2^28 and readout not negative, got {d} and {readout}")
    bits = _keystream_bits(key, b"mtlsign/v0/signs/%d" % readout, d)
    return bits.view(np.int8) * np.int8(2) - np.int8(1)
