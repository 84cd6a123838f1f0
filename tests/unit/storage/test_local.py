"""Tests of LocalStorage and of the atomic file write."""

from __future__ import annotations

import errno
import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.errors import ArtifactError, StorageError
from mtlsign.storage.base import Storage
from mtlsign.storage.local import LocalStorage, atomic_write, open_atomic
from mtlsign.storage.locations import open_storage


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


def test_local_storage_written_file_is_read_listed_and_deleted(store: Storage) -> None:
    assert store.list() == []
    assert store.write("runs/x/one.txt", b"1") and store.write("two.txt", b"2")
    assert store.write("two.txt", b"22")
    assert store.read("two.txt", 2) == b"22"
    assert store.list() == ["runs/x/one.txt", "two.txt"]
    assert store.list("runs") == ["runs/x/one.txt"] and store.child("runs").list() == ["x/one.txt"]
    assert store.exists("two.txt") and not store.exists("runs") and not store.exists("three.txt")
    store.delete("runs")
    store.delete("two.txt")
    store.delete("missing")
    assert store.list() == []


def test_write_if_absent_with_racing_writers_succeeds_once(store: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        successes = list(pool.map(lambda i: store.write("once", b"%d" % i, if_absent=True), range(8)))
    assert sum(successes) == 1
    assert store.read("once", 9) == b"%d" % successes.index(True)
    assert store.list() == ["once"]


def test_read_of_large_missing_or_special_file_raises_artifact_error(store: Storage, tmp_path: Path) -> None:
    store.write("big", b"x" * 10)
    os.mkfifo(tmp_path / "store" / "pipe")
    for name in ("big", "absent", "pipe", "big/below"):
        with pytest.raises(ArtifactError):
            store.read(name, 9)
    with pytest.raises(StorageError):
        store.child("folder").write("../../out", b"")


def test_read_with_large_limit_allocates_only_file_size(store: Storage) -> None:
    """A reader that allocates its limit could not read a checkpoint under a limit of 32 GiB."""
    store.write("a", b"1234")
    assert store.read("a", 2**60) == b"1234"


def test_check_writable_leaves_no_files(tmp_path: Path) -> None:
    open_storage(str(tmp_path / "new" / "deep")).check_writable()
    assert list(tmp_path.iterdir()) == []


def test_check_writable_failure_names_setting_and_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"storage: Cannot write .*\. Choose a folder"):
        open_storage(str(tmp_path / "file")).check_writable()

    def overwrites(self: LocalStorage, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        return True

    monkeypatch.setattr(LocalStorage, "write", overwrites)
    with pytest.raises(StorageError, match="If-None-Match"):
        open_storage(str(tmp_path)).check_writable()


@pytest.mark.parametrize(
    "name", ["", "/etc/x", "a//b", "../a", "a/../b", ".", "a\\b", "a\0b", "a\nb", ".tmp-x", "x" * 999]
)
def test_storage_unsafe_names_raise_storage_error(store: Storage, name: str) -> None:
    for use in (lambda: store.write(name, b""), lambda: store.read(name, 1), lambda: store.child(name)):
        with pytest.raises(StorageError):
            use()


@given(st.text(max_size=30))
def test_child_of_any_name_stays_inside_folder(name: str) -> None:
    root = Path("/nowhere/root")
    try:
        path = LocalStorage(root).child(name).root
    except StorageError:
        return
    assert Path(os.path.normpath(path)).is_relative_to(root) and path != root


class SimulatedCrash(Exception):
    """Stands for the end of the process."""


def test_write_crashing_before_rename_keeps_old_file(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("file", b"old")

    def crash(_: int) -> None:
        raise SimulatedCrash

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(SimulatedCrash):
        store.write("file", b"new")
    assert store.read("file", 9) == b"old" and store.list() == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_atomic_write_creates_or_replaces_with_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    for data in (b"one", b"two"):
        atomic_write(path, data, mode=mode)
        assert path.read_bytes() == data and stat.S_IMODE(path.stat().st_mode) == mode
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_exclusive_keeps_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        atomic_write(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_atomic_write_exclusive_without_hard_links_uses_fallback_only_if_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    path = tmp_path / "file"
    with pytest.raises(PermissionError):
        atomic_write(path, b"data", exclusive=True)
    assert list(tmp_path.iterdir()) == []
    atomic_write(path, b"data", exclusive=True, without_hard_links=True)
    with pytest.raises(FileExistsError):
        atomic_write(path, b"other", exclusive=True, without_hard_links=True)
    assert path.read_bytes() == b"data" and list(tmp_path.iterdir()) == [path]


def test_open_atomic_with_exception_in_block_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SimulatedCrash), open_atomic(tmp_path / "file") as file:
        file.write(b"part")
        raise SimulatedCrash
    assert list(tmp_path.iterdir()) == []


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_child_has_private_folders_and_files_whatever_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        store = open_storage(str(tmp_path / "new" / "store"))
        folder = store.child("runs", private=True).child("one")
        folder.write("checkpoints/mark.pt", b"secret")
        folder.write("settings.json", b"{}", if_absent=True)
        pickle.loads(pickle.dumps(folder)).child("cells").child("a").write("deep/state.pt", b"secret")
        store.child("models").write("digest/model.safetensors", b"public")
    finally:
        os.umask(previous)
    private = [tmp_path / "new/store/runs", *(tmp_path / "new/store/runs").rglob("*")]
    assert {mode_of(path) for path in private if path.is_dir()} == {0o700}
    assert {mode_of(path) for path in private if path.is_file()} == {0o600}
    assert mode_of(tmp_path / "new/store") == 0o777
    assert mode_of(tmp_path / "new/store/models/digest/model.safetensors") == 0o666


def test_private_child_does_not_change_folder_of_its_user(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o750)
    open_storage(str(tmp_path)).child("runs", private=True).write("one/file", b"secret")
    assert (mode_of(tmp_path / "runs"), mode_of(tmp_path / "runs/one")) == (0o750, 0o700)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_write_on_full_disk_names_cause_and_resumption(
    code: int, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"^storage: The disk has no space for .*state.pt\..*--resume\.$"):
        store.write("state.pt", b"data")
    monkeypatch.undo()
    assert store.list() == []
