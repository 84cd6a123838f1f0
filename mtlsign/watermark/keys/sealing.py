r"""Encryption at rest of what must stay secret: one sealed envelope per file.

Envelope (all of it before the ciphertext is authenticated as associated data):

    magic      8 bytes   b"MTLS\x00v0\n"
    length     4 bytes   of the header, big-endian, at most 1,024
    header     JSON      {"cipher":"chacha20poly1305","kdf":…,"nonce":24 hex,"purpose":…,"salt":64 hex},
                         with kdf "scrypt" also "n", "p" and "r"
    ciphertext           ChaCha20-Poly1305 (RFC 8439) of the plaintext, its 16-byte tag at the end

kdf "hkdf-sha256": key = HKDF-SHA256(the identity's 32-byte kit key, salt, info = purpose), 32 bytes.
kdf "scrypt": key = scrypt(passphrase, salt, n, r, p), 32 bytes; its cost is limited before any work is done.
Salt (32 bytes) and nonce (12 bytes) are fresh random ones in every envelope.
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

MAGIC = b"MTLS\x00v0\n"
HEADER_LIMIT = 1024
PLAINTEXT_LIMIT = 2**31 - 64
"""Bytes that one envelope can hold (the cipher's interface ends at 2 GiB)."""

_SCRYPT = {"n": 2**15, "r": 8, "p": 1}
_SCRYPT_LIMITS = {"n": 2**17, "r": 8, "p": 2}
_PASSPHRASE_LIMIT = 1024


@dataclass(frozen=True)
class EncryptionSecret:
    """What opens an envelope: an identity's kit key or a passphrase. Never shown by `repr`."""

    kind: Literal["kit key", "passphrase"]
    value: bytes

    def __post_init__(self) -> None:
        if self.kind == "kit key" and len(self.value) != 32:
            raise KeyMaterialError(
                "a kit key has 32 bytes; take `kit_key` of the owner's identity", field="owner"
            )
        if self.kind == "passphrase" and not 1 <= len(self.value) <= _PASSPHRASE_LIMIT:
            limit = f"1 to {_PASSPHRASE_LIMIT} bytes"
            raise KeyMaterialError(f"a passphrase has {limit}; choose another", field="passphrase")

    @classmethod
    def from_kit_key(cls, kit_key: bytes) -> EncryptionSecret:
        """The identity's kit key, 32 bytes."""
        return cls("kit key", bytes(kit_key))

    @classmethod
    def from_passphrase(cls, passphrase: bytes) -> EncryptionSecret:
        """A passphrase's exact bytes, 1 to 1,024 of them."""
        return cls("passphrase", bytes(passphrase))

    def __repr__(self) -> str:
        return f"Secret({self.kind}, hidden)"


def encrypt_envelope(plaintext: bytes, secret: EncryptionSecret, *, purpose: str) -> bytes:
    """The envelope around `plaintext`, which `unseal` opens with the same secret and purpose.

    Raises: KeyMaterialError when `plaintext` is over PLAINTEXT_LIMIT bytes or `purpose` is not 1 to 64 ASCII.
    """
    if not (purpose.isascii() and purpose.isprintable() and 1 <= len(purpose) <= 64):
        raise KeyMaterialError("a purpose is 1 to 64 printable ASCII characters; shorten it")
    if len(plaintext) > PLAINTEXT_LIMIT:
        raise KeyMaterialError("more than 2 GiB cannot be sealed; use a smaller head or fewer taps")
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
    """The plaintext in an envelope from anywhere.

    Raises: KeyMaterialError, always one line: no envelope, another purpose, the wrong secret, or damage.
    """
    view = memoryview(sealed)
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise KeyMaterialError("this is no sealed file of mtlsign v0; give the right file")
    start = len(MAGIC) + 4
    length = int.from_bytes(view[len(MAGIC) : start], "big")
    if length > HEADER_LIMIT or len(view) < start + length + 16:
        raise KeyMaterialError("the sealed file is damaged or cut short; fetch it again")
    front = bytes(view[: start + length])
    salt, nonce, kdf, costs = _parse_header(front[start:], purpose)
    wanted = "kit key" if kdf == "hkdf-sha256" else "passphrase"
    if secret.kind != wanted:
        fix = {"kit key": "give the owner's identity", "passphrase": "give that passphrase"}[wanted]
        raise KeyMaterialError(f"this file was sealed under a {wanted}; {fix}", field="owner")
    if len(view) - len(front) > PLAINTEXT_LIMIT + 16:
        raise KeyMaterialError("the sealed file is over 2 GiB; give the right file")
    try:
        return ChaCha20Poly1305(_derive(secret, salt, purpose, costs)).decrypt(
            nonce, view[len(front) :], front
        )
    except InvalidTag:
        message = f"the {wanted} is wrong or the sealed file is damaged; give the one it was sealed under"
        raise KeyMaterialError(message, field="owner" if wanted == "kit key" else "passphrase") from None


def _derive(secret: EncryptionSecret, salt: bytes, purpose: str, costs: dict[str, int]) -> bytes:
    if secret.kind == "kit key":
        return HKDF(hashes.SHA256(), 32, salt, purpose.encode()).derive(secret.value)
    return Scrypt(salt, 32, costs["n"], costs["r"], costs["p"]).derive(secret.value)


def _parse_header(text: bytes, purpose: str) -> tuple[bytes, bytes, str, dict[str, int]]:
    damaged = KeyMaterialError("the sealed file's header is damaged; fetch the file again")
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
        raise KeyMaterialError(f"the sealed file holds something else than {purpose}; give the right file")
    return salt, nonce, kdf, costs
