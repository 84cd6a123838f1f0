"""Tests of the identity file: atomic, private, protected by its passphrase."""

from __future__ import annotations

import copy
import json
import os
import pickle
import stat
from pathlib import Path

import pytest

from mtlsign.errors import KeyMaterialError
from mtlsign.watermark.keys import identity as identity_module

OWNER = identity_module.Identity(bytes(range(32)), bytes(range(32, 64)))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_CONFIG_HOME", "MTLSIGN_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def is_same(a: identity_module.Identity, b: identity_module.Identity) -> bool:
    return (a.public_key, a.kit_key, a.sign(b"x")) == (b.public_key, b.kit_key, b.sign(b"x"))


def test_identity_repr_and_pickle_reveal_no_secret() -> None:
    assert repr(OWNER) == f"Identity(public_key={OWNER.public_key.hex()})" and not hasattr(OWNER, "__dict__")
    for travel in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="KeyOpening"):
            travel(OWNER)
    with pytest.raises(KeyMaterialError):
        identity_module.Identity(b"short", bytes(32))


def test_identity_plain_file_round_trips_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "owner.json"
    OWNER.save(path, None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["owner.json"] and is_same(
        identity_module.Identity.load(path, None), OWNER
    )
    with pytest.raises(KeyMaterialError, match="exists"):
        identity_module.Identity.generate().save(path, None)
    assert is_same(identity_module.Identity.load(path, None), OWNER) and os.listdir(path.parent) == [
        "owner.json"
    ]
    with pytest.raises(KeyMaterialError, match="passphrase"):
        identity_module.Identity.load(path, b"needless")
    path.chmod(0o640)
    with pytest.raises(KeyMaterialError, match="chmod 600"):
        identity_module.Identity.load(path, None)


def test_identity_sealed_file_needs_its_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "owner.json"
    OWNER.save(path, b"correct horse")
    text = path.read_text()
    assert bytes(range(32)).hex() not in text and OWNER.kit_key.hex() not in text
    assert is_same(identity_module.Identity.load(path, b"correct horse"), OWNER)
    with pytest.raises(KeyMaterialError, match="passphrase"):
        identity_module.Identity.load(path, b"wrong")
    with pytest.raises(KeyMaterialError, match="--passphrase-file"):
        identity_module.Identity.load(path, None)
    with pytest.raises(KeyMaterialError, match="empty"):
        OWNER.save(tmp_path / "other.json", b"")
    other = identity_module.Identity.generate().public_key.hex()
    fields = json.loads(text)
    for change in (
        {"n": 2**30},
        {"p": True},
        {"public_key": other},
        {"salt": "00"},
        {"protection": 1},
        {"x": 1},
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises(KeyMaterialError):
            identity_module.Identity.load(path, b"correct horse")


def test_identity_load_of_hostile_files_raises(tmp_path: Path) -> None:
    path = tmp_path / "owner.json"
    OWNER.save(path, None)
    fields = json.loads(path.read_text())
    hostile = [b"", b"[]", b"\xff", b" " * 70000, json.dumps(fields | {"version": 2}).encode()]
    hostile += [
        json.dumps(fields | {"secret": "00" * 64}).encode(),
        json.dumps(fields | {"secret": 5}).encode(),
    ]
    for data in hostile:
        path.write_bytes(data)
        with pytest.raises(KeyMaterialError) as caught:
            identity_module.Identity.load(path, None)
        assert fields["secret"] not in str(caught.value)
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path / "none", tmp_path, tmp_path / "pipe", Path("a\0b")):
        with pytest.raises(KeyMaterialError):
            identity_module.Identity.load(bad, None)
    for bad in (path / "under-a-file", Path("/proc/none/x"), Path("a\0b"), Path()):
        with pytest.raises(KeyMaterialError):
            OWNER.save(bad, None)


def test_identity_save_without_hard_links_writes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "owner.json"
    OWNER.save(path, None)
    assert is_same(identity_module.Identity.load(path, None), OWNER) and os.listdir(tmp_path) == [
        "owner.json"
    ]
    with pytest.raises(KeyMaterialError, match="exists"):
        OWNER.save(path, None)


def test_read_passphrase_strips_one_line_break_and_refuses_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "pass"
    path.touch(mode=0o600)
    for data, expected in ((b"a b \n", b"a b "), (b"x\r\n", b"x"), (b"x\n\n", b"x\n"), (b"x", b"x")):
        path.write_bytes(data)
        assert identity_module.read_passphrase(path) == expected
    for data in (b"", b"\n", b"x" * 2000):
        path.write_bytes(data)
        with pytest.raises(KeyMaterialError):
            identity_module.read_passphrase(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_read_passphrase_of_file_that_others_can_read_raises(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "pass"
    path.write_bytes(b"correct horse\n")
    path.chmod(mode)
    with pytest.raises(
        KeyMaterialError, match=r"Other users can read .*pass\. Run chmod 600 on it"
    ) as caught:
        identity_module.read_passphrase(path)
    assert "horse" not in str(caught.value)


def test_load_identity_without_file_names_it_and_creates_nothing(home: Path) -> None:
    with pytest.raises(
        KeyMaterialError, match=r"^owner: There is no owner identity at .*identity\.json\. Copy"
    ):
        identity_module.load_identity(None, None)
    assert not identity_module.default_identity_path().exists()
    created, path, _ = identity_module.load_or_create_identity(None, None)
    loaded, same_path = identity_module.load_identity(None, None)
    assert is_same(created, loaded) and path == same_path


def test_save_to_existing_file_advises_against_losing_it(tmp_path: Path) -> None:
    path = tmp_path / "owner.json"
    OWNER.save(path, None)
    with pytest.raises(KeyMaterialError, match="exists already, and is never replaced") as caught:
        identity_module.Identity.generate().save(path, None)
    assert "delete" not in str(caught.value) and "--owner" in str(caught.value)


def test_load_or_create_identity_creates_default_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, path, created = identity_module.load_or_create_identity(None, None)
    assert created and path == home / ".config" / "mtlsign" / "identity.json"
    again, same_path, created = identity_module.load_or_create_identity(None, None)
    assert not created and same_path == path and is_same(first, again)
    named, named_path, created = identity_module.load_or_create_identity(path, None)
    assert not created and named_path == path and is_same(named, first)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert identity_module.default_identity_path() == tmp_path / "xdg" / "mtlsign" / "identity.json"
    monkeypatch.setenv("MTLSIGN_HOME", str(tmp_path / "mine"))
    secret = tmp_path / "pass"
    secret.touch(mode=0o600)
    secret.write_text("word\n")
    sealed, path, created = identity_module.load_or_create_identity(None, secret)
    assert (
        created
        and path == tmp_path / "mine" / "identity.json"
        and is_same(identity_module.Identity.load(path, b"word"), sealed)
    )
    with pytest.raises(KeyMaterialError, match="passphrase"):
        identity_module.load_or_create_identity(None, None)


def test_load_or_create_identity_of_missing_file_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyMaterialError):
        identity_module.load_or_create_identity(tmp_path / "typo.json", None)
    assert os.listdir(tmp_path) == []


def test_load_or_create_identity_of_two_processes_gives_one_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    path = identity_module.default_identity_path()
    winner = identity_module.Identity.generate()
    real = identity_module.Identity.save

    def slow(self: identity_module.Identity, to: Path, passphrase: bytes | None) -> None:
        real(winner, to, passphrase)  # the other process
        real(self, to, passphrase)

    monkeypatch.setattr(identity_module.Identity, "save", slow)
    loaded, loaded_path, created = identity_module.load_or_create_identity(None, None)
    assert not created and loaded_path == path and is_same(loaded, winner)
