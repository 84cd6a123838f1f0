"""Tests of owner kits: encrypted at rest, hostile input, no secret shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlsign.config.verify import VerifySettings
from mtlsign.errors import ArtifactError, KeyMaterialError, MTLSignError
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_storage
from mtlsign.watermark.keys.identity import default_identity_path, load_or_create_identity
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret, encrypt_envelope
from mtlsign.watermark.kit import KIT_PURPOSE, OwnerKit, kit_owner, open_kit, read_kit, write_kit

SECRET = EncryptionSecret.from_kit_key(bytes(32))


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


def _kit(head: bytes | None = b"head") -> OwnerKit:
    opening = KeyOpening(spec=b'{"hush":1}', public_key=b"\1" * 32, signature=b"\2" * 64)
    return OwnerKit(
        opening, b"reference-bytes", b"w0-bytes", head, {"task": "digits", "created": "2026", "score": 0.5}
    )


@pytest.mark.parametrize("secret", [SECRET, EncryptionSecret.from_passphrase(b"correct horse")])
@pytest.mark.parametrize("head", [None, b"", b"head"])
def test_read_kit_returns_written_kit_and_file_is_encrypted(
    store: Storage, secret: EncryptionSecret, head: bytes | None
) -> None:
    kit_id = write_kit(store, _kit(head), secret)
    assert len(kit_id) == 16 and kit_id != write_kit(store, _kit(head), secret)
    folder = f"{store.uri}/kits/{kit_id}"
    assert read_kit(folder, secret) == read_kit(f"{folder}/kit.sealed", secret) == _kit(head)
    for name in store.list():
        content = store.read(name, 9999)
        assert not any(word in content for word in (b"hush", b"w0-bytes", b"digits", b"\2" * 64))


def test_owner_kit_repr_and_errors_show_no_secret(store: Storage) -> None:
    assert repr(_kit()) == str(_kit()) == "OwnerKit(hidden)"
    kit_id = write_kit(store, _kit(), SECRET)
    with pytest.raises(KeyMaterialError, match="Pass the kit key of the sealed file") as caught:
        read_kit(f"{store.uri}/kits/{kit_id}", EncryptionSecret.from_kit_key(b"\1" * 32))
    assert "hush" not in str(caught.value)


def test_read_kit_of_damaged_or_missing_kit_raises(store: Storage) -> None:
    kit_id = write_kit(store, _kit(), SECRET)
    with pytest.raises(ArtifactError, match=r"^kit: \S*/kits/none does not exist\. Correct the path\.$"):
        read_kit(f"{store.uri}/kits/none", SECRET)
    sealed = store.read(f"kits/{kit_id}/kit.sealed", 9999)
    store.write(f"kits/{kit_id}/kit.sealed", sealed[:-1] + bytes([sealed[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="does not match"):
        read_kit(f"{store.uri}/kits/{kit_id}", SECRET)
    with pytest.raises(KeyMaterialError, match="damaged"):
        read_kit(f"{store.uri}/kits/{kit_id}/kit.sealed", SECRET)


def _lp(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


OPENING = _kit().opening.to_json().encode()
CONTENT = (
    st.binary(max_size=60)
    | st.lists(st.binary(max_size=9), max_size=7).map(lambda parts: b"mtlsign/kit/v1\n" + _lp(*parts))
    | st.lists(st.sampled_from([OPENING, b"{}", b"[]", b"\xff", b"{", b""]), max_size=7).map(
        lambda parts: b"mtlsign/kit/v1\n" + _lp(*parts)
    )
    | st.binary(max_size=20).map(lambda tail: b"mtlsign/kit/v1\n" + _lp(OPENING, b"{}", b"r", b"w") + tail)
)


@given(CONTENT)
@settings(max_examples=60)
def test_read_kit_of_any_content_raises_only_mtlsign_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.sealed"
    path.write_bytes(encrypt_envelope(content, SECRET, purpose=KIT_PURPOSE))
    try:
        kit = read_kit(str(path), SECRET)
    except MTLSignError:
        return
    assert kit.opening == _kit().opening


def opened_kit(kit: str, **changes: object) -> VerifySettings:
    return VerifySettings.of({"model": ["x"], "kit": kit, **changes})


def test_open_kit_without_identity_names_owner_and_creates_none(store: Storage) -> None:
    folder = f"{store.uri}/kits/{write_kit(store, _kit(), SECRET)}"
    for location in (folder, f"{folder}/kit.sealed"):
        with pytest.raises(
            KeyMaterialError, match=f"^owner: The kit belongs to identity {'01' * 32}, and there is no"
        ):
            open_kit(opened_kit(location), location)
    store.delete(folder.removeprefix(f"{store.uri}/") + "/owner.json")
    with pytest.raises(KeyMaterialError, match="There is no owner identity at"):
        open_kit(opened_kit(f"{folder}/kit.sealed"), f"{folder}/kit.sealed")
    assert not default_identity_path().exists()


def test_open_kit_of_other_identity_names_both(store: Storage) -> None:
    folder = f"{store.uri}/kits/{write_kit(store, _kit(), SECRET)}"
    identity, _, _ = load_or_create_identity(None, None)
    with pytest.raises(
        KeyMaterialError,
        match=f"belongs to identity {'01' * 32}, not to {identity.public_key.hex()}. Pass the identity file",
    ):
        open_kit(opened_kit(folder), folder)


def test_open_kit_of_own_identity_opens_and_damaged_owner_file_is_refused(store: Storage) -> None:
    identity, _, _ = load_or_create_identity(None, None)
    kit = replace(_kit(), opening=replace(_kit().opening, public_key=identity.public_key))
    kit_id = write_kit(store, kit, EncryptionSecret.from_kit_key(identity.kit_key))
    folder = f"{store.uri}/kits/{kit_id}"
    assert open_kit(opened_kit(folder), folder) == kit and kit_owner(folder) == identity.public_key.hex()
    for content in (b"{}", b"[", b'{"public_key": "<b>"}', None):
        store.delete(f"kits/{kit_id}/owner.json")
        if content is not None:
            store.write(f"kits/{kit_id}/owner.json", content)
        assert kit_owner(folder) is None
        with pytest.raises(ArtifactError, match=r"owner\.json.* Or pass its kit\.sealed alone"):
            open_kit(opened_kit(folder), folder)
        sealed = f"{folder}/kit.sealed"
        assert open_kit(opened_kit(sealed), sealed) == kit, "the kit itself is not lost"
