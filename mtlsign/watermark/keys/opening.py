"""Key openings and keystreams (docs/decisions/0001; `docs/format.md`, sections "Key" and "Keystreams").

An `Identity` signs a spec. Spec, public key and signature together are a `KeyOpening`, and their hash is the
key. The key alone determines the integers π, the labels l and the keyed head's signs p. An opening is secret
until a claim reveals it; a revealed key must not be used again.
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
from mtlsign.storage.versions import EMBED_AGAIN, refuse_version_0
from mtlsign.watermark.keys.identity import Identity, length_prefixed
from mtlsign.watermark.keys.spec import MAX_SPEC_BYTES, Spec, m_bits, parse_spec

OPENING_FORMAT = "mtlsign/key-opening/v1"
MAX_OPENING_BYTES = 32 * 1024

_P = 2**255 - 19
_L = 2**252 + 27742317777372353535851937790883648493
_Y8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
# The y of the 8 points of order 1, 4 (0: two points), 2 and 8 (four points). A test derives the last two.
_SMALL_ORDER_Y = frozenset({1, 0, _P - 1, _Y8, _P - _Y8})


def check_public_key(public_key: bytes) -> None:
    """Raise KeyMaterialError for a public key that is not 32 bytes, not canonical or of small order."""
    if len(public_key) != 32:
        raise KeyMaterialError(
            "A public key must have 32 bytes. Pass the opening unmodified.", field="public_key"
        )
    y = int.from_bytes(public_key, "little") & (2**255 - 1)
    if y >= _P or y in _SMALL_ORDER_Y:
        raise KeyMaterialError(
            "The key is of small order or not canonical, so that its signatures prove nothing. "
            "Use a key of Identity.generate.",
            field="public_key",
        )


def is_valid_signature(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Return whether an Ed25519 signature is valid by the rules of `docs/format.md`, section "Key".

    A public key of small order or not in canonical form is invalid, and so is a signature that does not have
    64 bytes or whose S is not below the group's order.

    Args:
        public_key: 32 bytes.
        signature: 64 bytes.
        message: the signed bytes.
    """
    try:
        check_public_key(public_key)
        if len(signature) != 64 or int.from_bytes(signature[32:], "little") >= _L:
            return False
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, KeyMaterialError, ValueError):
        return False
    return True


def _signed_message(spec: bytes, public_key: bytes) -> bytes:
    return b"mtlsign/v1/spec" + length_prefixed(spec) + length_prefixed(public_key)


@dataclass(frozen=True, slots=True)
class KeyOpening:
    """(spec, public key, signature): the only form in which a key is stored, sent or revealed.

    The key can be computed from it, so `repr` shows neither the spec nor the signature.
    """

    spec: bytes = field(repr=False)
    public_key: bytes
    signature: bytes = field(repr=False)

    def parse(self) -> Spec:
        """Return the checked spec; raise KeyMaterialError as `parse_spec` does."""
        return parse_spec(self.spec)

    def key(self) -> bytes:
        """Return the watermark key, 32 bytes, after every check of `docs/format.md`, section "Key".

        Raises:
            KeyMaterialError: bad spec, small-order or non-canonical public key, or wrong signature.
        """
        parse_spec(self.spec)
        check_public_key(self.public_key)
        message = _signed_message(self.spec, self.public_key)
        try:
            if len(self.signature) != 64 or int.from_bytes(self.signature[32:], "little") >= _L:
                raise InvalidSignature
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(self.signature, message)
        except (InvalidSignature, ValueError):
            raise KeyMaterialError(
                "The signature does not match the spec and the public key. Pass the opening unmodified.",
                field="signature",
            ) from None
        hashed = (
            b"mtlsign/v1/key"
            + length_prefixed(self.spec)
            + length_prefixed(self.public_key)
            + length_prefixed(self.signature)
        )
        return hashlib.sha256(hashed).digest()

    def to_json(self) -> str:
        """Return the opening as JSON (`docs/format.md`, section "Key opening"). Secret until the claim."""
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
        refuse_version_0(parsed, "format", where=where, fix=EMBED_AGAIN)
        fields = require_fields(parsed, where, "format", "spec", "public_key", "signature")
        if fields["format"] != OPENING_FORMAT:
            raise_invalid("opening.format", f"The format must be {OPENING_FORMAT}")
        text = fields["spec"]
        try:
            if not isinstance(text, str):
                raise ValueError
            spec = base64.b64decode(text, validate=True)
            if len(spec) > MAX_SPEC_BYTES or base64.b64encode(spec).decode("ascii") != text:
                raise ValueError
        except (ValueError, binascii.Error):
            raise KeyMaterialError(
                "The field must be a spec in canonical base64. Pass the opening unmodified.",
                field="opening.spec",
            ) from None
        return cls(
            spec=spec,
            public_key=require_hex(fields["public_key"], "opening.public_key", 32),
            signature=require_hex(fields["signature"], "opening.signature", 64),
        )


def sign_spec(identity: Identity, spec: bytes) -> KeyOpening:
    """Sign a spec's exact bytes; raise KeyMaterialError if `parse_spec` refuses them."""
    raw = parse_spec(spec).raw
    return KeyOpening(raw, identity.public_key, identity.sign(_signed_message(raw, identity.public_key)))


def keystream(key: bytes, label: bytes, size: int) -> bytes:
    """Return the first `size` bytes of the ChaCha20 stream under HKDF-SHA256(key, label).

    Args:
        key: 32 bytes.
        label: name of the stream.
        size: number of bytes.
    """
    if not isinstance(key, bytes) or len(key) != 32:
        raise KeyMaterialError("The key must have 32 bytes. Compute it with KeyOpening.key.", field="key")
    subkey = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=label).derive(key)
    encryptor = Cipher(algorithms.ChaCha20(subkey, bytes(16)), mode=None).encryptor()
    return encryptor.update(bytes(size))


def _keystream_bits(key: bytes, label: bytes, count: int) -> npt.NDArray[np.uint8]:
    """Return the first `count` bits of the keystream of (key, label), MSB of each byte first, as 0 and 1."""
    stream = np.frombuffer(keystream(key, label, (count + 7) // 8), dtype=np.uint8)
    return np.unpackbits(stream, count=count)


def watermark_integers(key: bytes, n: int) -> npt.NDArray[np.int64]:
    """Derive π: the first n distinct m-bit integers of a keystream, int64 [n], m = 3·⌈log2 n⌉ (§3.2)."""
    if not 2 <= n <= 65536:
        raise ValueError(f"n must be from 2 to 65536, got {n}")
    m = m_bits(n)
    powers = np.left_shift(np.int64(1), np.arange(m - 1, -1, -1, dtype=np.int64))
    drawn = n + 16
    while True:
        values = _keystream_bits(key, b"mtlsign/v1/integers", drawn * m).reshape(drawn, m) @ powers
        first = np.sort(np.unique(values, return_index=True)[1])
        if len(first) >= n:
            return np.asarray(values[first[:n]], dtype=np.int64)
        drawn *= 2


def watermark_labels(key: bytes, n: int) -> npt.NDArray[np.uint8]:
    """Derive l: the first n bits of a separate keystream, uint8 [n] of 0 and 1 (paper §3.2)."""
    if not 1 <= n <= 65536:
        raise ValueError(f"n must be from 1 to 65536, got {n}")
    return _keystream_bits(key, b"mtlsign/v1/labels", n)


def head_signs(key: bytes, d: int, readout: int = 0) -> npt.NDArray[np.int8]:
    """Derive the signs of the keyed head; its projection is p = signs/√d.

    Args:
        key: 32 bytes.
        d: number of features.
        readout: 0; further read-outs have other keys (`mtlsign.watermark.verification.readouts`).

    Returns:
        int8 [d] of +1 (bit 1) and -1 (bit 0).
    """
    if not 1 <= d <= 2**28 or readout < 0:
        raise ValueError(f"d must be from 1 to 2^28 and readout not negative, got {d} and {readout}")
    bits = _keystream_bits(key, b"mtlsign/v1/signs/%d" % readout, d)
    return bits.view(np.int8) * np.int8(2) - np.int8(1)


def spread_order(key: bytes, d: int) -> npt.NDArray[np.int64]:
    """Derive the permutation of the spread head's coordinates.

    Coordinates are sorted by the first d big-endian 64-bit integers of a keystream, ties by position.

    Args:
        key: 32 bytes.
        d: number of coordinates.

    Returns:
        int64 [d].
    """
    if not 1 <= d <= 2**26:
        raise ValueError(f"d must be from 1 to 2^26, got {d}")
    numbers = np.frombuffer(keystream(key, b"mtlsign/v1/spread", 8 * d), dtype=">u8")
    return np.argsort(numbers.astype(np.uint64), kind="stable").astype(np.int64)
