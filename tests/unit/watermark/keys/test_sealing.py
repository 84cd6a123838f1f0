"""Tests of sealed envelopes: round trips, refusals, and no secret in any text."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.errors import KeyMaterialError
from mtlsign.watermark.keys.sealing import (
    HEADER_LIMIT,
    MAGIC,
    EncryptionSecret,
    decrypt_envelope,
    encrypt_envelope,
)

KEY = EncryptionSecret.from_kit_key(bytes(range(32)))


PASSPHRASE = EncryptionSecret.from_passphrase(b"correct horse")


PURPOSE = "mtlsign/v1/test"


SEALED = encrypt_envelope(b"hello", KEY, purpose=PURPOSE)


def _header(sealed: bytes) -> dict[str, object]:
    length = int.from_bytes(sealed[8:12], "big")
    header = json.loads(sealed[12 : 12 + length])
    assert isinstance(header, dict)
    return header


def _envelope(header: object, ciphertext: bytes = bytes(32)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return MAGIC + len(text).to_bytes(4, "big") + text + ciphertext


@pytest.mark.parametrize("secret", [KEY, PASSPHRASE])
@pytest.mark.parametrize("plaintext", [b"", b"x" * 100_000])
def test_decrypt_envelope_returns_encrypted_plaintext(secret: EncryptionSecret, plaintext: bytes) -> None:
    sealed = encrypt_envelope(plaintext, secret, purpose=PURPOSE)
    assert decrypt_envelope(sealed, secret, purpose=PURPOSE) == plaintext
    assert encrypt_envelope(plaintext, secret, purpose=PURPOSE) != sealed


def test_encrypt_envelope_follows_documented_format() -> None:
    header = _header(SEALED)
    front = SEALED[: 12 + int.from_bytes(SEALED[8:12], "big")]
    assert SEALED[:8] == b"MTLS\x00v1\n" and header["kdf"] == "hkdf-sha256" and header["purpose"] == PURPOSE
    salt, nonce = bytes.fromhex(str(header["salt"])), bytes.fromhex(str(header["nonce"]))
    key = HKDF(hashes.SHA256(), 32, salt, PURPOSE.encode()).derive(KEY.value)
    assert ChaCha20Poly1305(key).decrypt(nonce, SEALED[len(front) :], front) == b"hello"


def test_decrypt_envelope_with_wrong_secret_or_purpose_names_fix() -> None:
    under_passphrase = encrypt_envelope(b"hello", PASSPHRASE, purpose=PURPOSE)
    for sealed, secret, fix in (
        (
            SEALED,
            EncryptionSecret.from_kit_key(bytes(32)),
            "kit key is wrong, or .* damaged. Pass the kit key",
        ),
        (
            under_passphrase,
            EncryptionSecret.from_passphrase(b"wrong horse"),
            "passphrase is wrong, or .* damaged. Pass",
        ),
        (under_passphrase, KEY, "sealed under a passphrase. Pass that passphrase"),
        (SEALED, PASSPHRASE, "sealed under a kit key. Pass the owner's identity"),
    ):
        with pytest.raises(KeyMaterialError, match=fix) as caught:
            decrypt_envelope(sealed, secret, purpose=PURPOSE)
        text = str(caught.value)
        assert "\n" not in text and "horse" not in text and caught.value.__cause__ is None
    with pytest.raises(KeyMaterialError, match="not sealed for other"):
        decrypt_envelope(SEALED, KEY, purpose="other")


@pytest.mark.parametrize("place", range(len(SEALED)))
def test_decrypt_envelope_detects_every_changed_byte_and_truncation(place: int) -> None:
    damaged = bytearray(SEALED)
    damaged[place] ^= 1
    with pytest.raises(KeyMaterialError):
        decrypt_envelope(bytes(damaged), KEY, purpose=PURPOSE)
    with pytest.raises(KeyMaterialError):
        decrypt_envelope(SEALED[:place], KEY, purpose=PURPOSE)


SCRYPT = _header(encrypt_envelope(b"", PASSPHRASE, purpose=PURPOSE))


@pytest.mark.parametrize(
    "change",
    [
        {"n": 2**18},
        {"n": 3},
        {"n": 0},
        {"n": 1},
        {"n": True},
        {"n": "8"},
        {"r": 9},
        {"p": 3},
        {"n": 2**40, "r": 8},
        {"salt": ""},
        {"salt": "zz"},
        {"salt": 1},
        {"nonce": "00"},
        {"kdf": "none"},
        {"kdf": "hkdf-sha256"},
        {"cipher": "none"},
        {"more": "x"},
        {"purpose": None},
    ],
)
def test_decrypt_envelope_checks_header_before_key_derivation(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> bytes:
        raise AssertionError("derived a key from a refused header")

    monkeypatch.setattr("mtlsign.watermark.keys.sealing._derive", never)
    with pytest.raises(KeyMaterialError):
        decrypt_envelope(_envelope({**SCRYPT, **change}), PASSPHRASE, purpose=PURPOSE)
    with pytest.raises(KeyMaterialError):
        decrypt_envelope(_envelope(b" " * (HEADER_LIMIT + 1)), PASSPHRASE, purpose=PURPOSE)


@given(
    st.binary(max_size=200)
    | st.binary(max_size=120).map(_envelope)
    | st.dictionaries(st.sampled_from([*SCRYPT, "x"]), st.none() | st.integers() | st.text(max_size=4)).map(
        lambda change: _envelope({**_header(SEALED), **change})
    )
)
def test_decrypt_envelope_of_hostile_bytes_raises_only_key_material_error(data: bytes) -> None:
    with pytest.raises(KeyMaterialError):
        decrypt_envelope(data, KEY, purpose=PURPOSE)


def test_encryption_secret_is_limited_and_hidden() -> None:
    assert "horse" not in repr(PASSPHRASE) and "horse" not in f"{PASSPHRASE}" and "x00" not in repr(KEY)
    for make in (
        lambda: EncryptionSecret.from_kit_key(b"short"),
        lambda: EncryptionSecret.from_passphrase(b""),
        lambda: EncryptionSecret.from_passphrase(b"x" * 1025),
        lambda: encrypt_envelope(b"", KEY, purpose=""),
        lambda: encrypt_envelope(b"", KEY, purpose="é"),
    ):
        with pytest.raises(KeyMaterialError):
            make()
