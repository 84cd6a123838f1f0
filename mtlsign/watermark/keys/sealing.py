r"""Encryption at rest of secret files: one sealed envelope for each file.

Envelope (all of it before the ciphertext is authenticated as associated data):

    magic      8 bytes   b"MTLS\x00v1\n"
    length     4 bytes   of the header, big-endian, at most 1,024
    header     JSON      {"cipher":"chacha20poly1305","kdf":…,"nonce":24 hex,"purpose":…,"salt":64 hex},
                         with kdf "scrypt" also "n", "p" and "r"
    ciphertext           ChaCha20-Poly1305 (RFC 8439) of the plaintext, its 16-byte tag at the end

kdf "hkdf-sha256": key = HKDF-SHA256(the identity's 32-byte kit key, salt, info = purpose), 32 bytes.
kdf "scrypt": key = scrypt(passphrase, salt, n, r, p), 32 bytes; its cost is checked before the computation.
Salt (32 bytes) and nonce (12 bytes) are random and new in every envelope.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from mtlsign.errors import KeyMaterialError
from mtlsign.storage.strict_json import parse_strict_json
from mtlsign.storage.versions import EMBED_AGAIN, raise_old_version

MAGIC = b"MTLS\x00v1\n"
OLD_MAGIC = b"MTLS\x00v0\n"
"""Start of an envelope of version 0."""
HEADER_LIMIT = 1024
PLAINTEXT_LIMIT = 2**31 - 64
"""Bytes that one envelope can hold (the cipher's interface ends at 2 GiB)."""

_SCRYPT = {"n": 2**15, "r": 8, "p": 1}
_SCRYPT_LIMITS = {"n": 2**17, "r": 8, "p": 2}
_PASSPHRASE_LIMIT = 1024


@dataclass(frozen=True)
class EncryptionSecret:
    """Secret that opens an envelope: an identity's kit key or a passphrase. `repr` hides it."""

    kind: Literal["kit key", "passphrase"]
    value: bytes

    def __post_init__(self) -> None:
        if self.kind == "kit key" and len(self.value) != 32:
            raise KeyMaterialError(
                "A kit key must have 32 bytes. Use `kit_key` of the owner's identity.", field="owner"
            )
        if self.kind == "passphrase" and not 1 <= len(self.value) <= _PASSPHRASE_LIMIT:
            raise KeyMaterialError(
                f"A passphrase must have 1 to {_PASSPHRASE_LIMIT} bytes. Choose another.", field="passphrase"
            )

    @classmethod
    def from_kit_key(cls, kit_key: bytes) -> EncryptionSecret:
        """Return the secret of an identity's kit key, 32 bytes."""
        return cls("kit key", bytes(kit_key))

    @classmethod
    def from_passphrase(cls, passphrase: bytes) -> EncryptionSecret:
        """Return the secret of a passphrase, 1 to 1,024 exact bytes."""
        return cls("passphrase", bytes(passphrase))

    def __repr__(self) -> str:
        return f"EncryptionSecret({self.kind}, hidden)"


def encrypt_envelope(plaintext: bytes, secret: EncryptionSecret, *, purpose: str) -> bytes:
    """Encrypt `plaintext`; `decrypt_envelope` opens the envelope with the same secret and purpose.

    Args:
        plaintext: at most PLAINTEXT_LIMIT bytes.
        secret: kit key or passphrase.
        purpose: 1 to 64 printable ASCII characters.

    Raises:
        KeyMaterialError: `plaintext` or `purpose` is outside its limits.
    """
    if not (purpose.isascii() and purpose.isprintable() and 1 <= len(purpose) <= 64):
        raise KeyMaterialError("A purpose must be 1 to 64 printable ASCII characters. Shorten it.")
    if len(plaintext) > PLAINTEXT_LIMIT:
        raise KeyMaterialError("More than 2 GiB cannot be sealed. Use a smaller head or fewer taps.")
    salt, nonce = secrets.token_bytes(32), secrets.token_bytes(12)
    header: dict[str, object] = {"cipher": "chacha20poly1305", "nonce": nonce.hex(), "purpose": purpose}
    header["salt"] = salt.hex()
    header["kdf"] = "hkdf-sha256" if secret.kind == "kit key" else "scrypt"
    if secret.kind == "passphrase":
        header.update(_SCRYPT)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    front = MAGIC + len(text).to_bytes(4, "big") + text
    key = _derive(secret, salt, purpose, _SCRYPT)
    return front + ChaCha20Poly1305(key).encrypt(nonce, plaintext, front)


def decrypt_envelope(sealed: bytes, secret: EncryptionSecret, *, purpose: str) -> bytes:
    """Decrypt an untrusted envelope.

    Args:
        sealed: bytes of the envelope.
        secret: the secret under which it was encrypted.
        purpose: the purpose for which it was encrypted.

    Raises:
        KeyMaterialError: the bytes are no envelope or damaged, or the purpose or secret is wrong.
    """
    view = memoryview(sealed)
    if bytes(view[: len(OLD_MAGIC)]) == OLD_MAGIC:
        raise_old_version("MTLS v0", where="kit", fix=EMBED_AGAIN)
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise KeyMaterialError("This is not a sealed file of mtlsign v1. Pass the right file.")
    start = len(MAGIC) + 4
    length = int.from_bytes(view[len(MAGIC) : start], "big")
    if length > HEADER_LIMIT or len(view) < start + length + 16:
        raise KeyMaterialError("The sealed file is damaged or truncated. Fetch it again.")
    front = bytes(view[: start + length])
    salt, nonce, kdf, costs = _parse_header(front[start:], purpose)
    kind = "kit key" if kdf == "hkdf-sha256" else "passphrase"
    if secret.kind != kind:
        fix = {"kit key": "Pass the owner's identity.", "passphrase": "Pass that passphrase."}[kind]
        raise KeyMaterialError(f"This file was sealed under a {kind}. {fix}", field="owner")
    if len(view) - len(front) > PLAINTEXT_LIMIT + 16:
        raise KeyMaterialError("The sealed file has over 2 GiB. Pass the right file.")
    try:
        return ChaCha20Poly1305(_derive(secret, salt, purpose, costs)).decrypt(
            nonce, view[len(front) :], front
        )
    except InvalidTag:
        message = f"The {kind} is wrong, or the sealed file is damaged. Pass the {kind} of the sealed file."
        raise KeyMaterialError(message, field="owner" if kind == "kit key" else "passphrase") from None


def _derive(secret: EncryptionSecret, salt: bytes, purpose: str, costs: dict[str, int]) -> bytes:
    if secret.kind == "kit key":
        return HKDF(hashes.SHA256(), 32, salt, purpose.encode()).derive(secret.value)
    return Scrypt(salt, 32, costs["n"], costs["r"], costs["p"]).derive(secret.value)


def _parse_header(text: bytes, purpose: str) -> tuple[bytes, bytes, str, dict[str, int]]:
    damaged = KeyMaterialError("The sealed file's header is damaged. Fetch the file again.")
    header = parse_strict_json(text, limit=HEADER_LIMIT, where="sealed header")
    if not isinstance(header, dict):
        raise damaged
    costs = {name: header.pop(name) for name in tuple(_SCRYPT_LIMITS) if name in header}
    fields = {name: value for name, value in header.items() if isinstance(value, str)}
    if fields.keys() != {"cipher", "kdf", "nonce", "purpose", "salt"} or len(fields) != len(header):
        raise damaged
    try:
        salt, nonce = bytes.fromhex(fields["salt"]), bytes.fromhex(fields["nonce"])
    except ValueError:
        raise damaged from None
    kdf = fields["kdf"]
    known = costs.keys() == {"hkdf-sha256": set(), "scrypt": _SCRYPT_LIMITS.keys()}.get(kdf)
    if not known or fields["cipher"] != "chacha20poly1305" or (len(salt), len(nonce)) != (32, 12):
        raise damaged
    for name, cost in costs.items():
        if type(cost) is not int or not 1 <= cost <= _SCRYPT_LIMITS[name]:
            raise damaged
    if costs and (costs["n"] < 2 or costs["n"] & (costs["n"] - 1)):
        raise damaged
    if fields["purpose"] != purpose:
        raise KeyMaterialError(f"The sealed file was not sealed for {purpose}. Pass the right file.")
    return salt, nonce, kdf, costs
