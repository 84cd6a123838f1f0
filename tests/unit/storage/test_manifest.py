"""Tests of manifest folders: committed or not at every crash, and hostile manifests."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.errors import ArtifactError
from mtlsign.storage.base import Storage
from mtlsign.storage.local import LocalStorage
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import (
    MANIFEST,
    manifest_bytes,
    parse_manifest,
    read_manifest_folder,
    write_manifest_folder,
)

FILES = {"a.bin": b"alpha", "b.bin": b"", "README.md": b"card\n"}


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


class SimulatedCrash(Exception):
    """Stands for the end of the process."""


class CrashingStorage(LocalStorage):
    """Storage that crashes at its k-th write: before it, or with `late` immediately after it."""

    def __init__(self, root: Path, failing_write: int, late: bool) -> None:
        super().__init__(root)
        self.failing_write, self.late = failing_write, late

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        self.failing_write -= 1
        if self.failing_write == 0 and not self.late:
            raise SimulatedCrash
        written = super().write(name, data, if_absent=if_absent)
        if self.failing_write == 0:
            raise SimulatedCrash
        return written


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("failing_write", range(1, len(FILES) + 2))
def test_write_manifest_folder_crashing_at_any_write_commits_all_or_none(
    store: Storage, failing_write: int, late: bool
) -> None:
    with pytest.raises(SimulatedCrash):
        write_manifest_folder(CrashingStorage(Path(store.uri), failing_write, late), FILES)
    if failing_write == len(FILES) + 1 and late:
        assert read_manifest_folder(store) == FILES
    else:
        with pytest.raises(ArtifactError, match=r"not a committed folder|does not exist"):
            read_manifest_folder(store)
    other = {**FILES, "a.bin": b"another attempt"}
    if not store.exists(MANIFEST):
        write_manifest_folder(store, other)
        assert read_manifest_folder(store) == other
    else:
        write_manifest_folder(store, FILES)
        with pytest.raises(ArtifactError, match="already holds"):
            write_manifest_folder(store, other)
        assert read_manifest_folder(store) == FILES


def test_delete_crashing_midway_leaves_no_committed_folder(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest_folder(store.child("runs/one"), FILES)

    def crash(path: Path) -> None:
        raise SimulatedCrash

    monkeypatch.setattr("shutil.rmtree", crash)
    with pytest.raises(SimulatedCrash):
        store.delete("runs")
    with pytest.raises(ArtifactError, match=r"not a committed folder|does not exist"):
        read_manifest_folder(store.child("runs/one"))


def test_write_manifest_folder_with_racing_writers_commits_one_content(store: Storage) -> None:
    def attempt(i: int) -> bool:
        try:
            write_manifest_folder(store, {"same": b"same", f"own{i % 2}": b""})
        except ArtifactError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        successes = list(pool.map(attempt, range(4)))
    assert any(successes) and read_manifest_folder(store)["same"] == b"same"


class OvertakenStorage(LocalStorage):
    """Storage in which another writer commits its files immediately before the k-th write."""

    def __init__(self, root: Path, overtaken_write: int) -> None:
        super().__init__(root)
        self.overtaken_write = overtaken_write

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        self.overtaken_write -= 1
        if self.overtaken_write == 0:
            write_manifest_folder(LocalStorage(self.root), FILES, replace_uncommitted=False)
        return super().write(name, data, if_absent=if_absent)


@pytest.mark.parametrize("overtaken_write", range(1, len(FILES) + 2))
@pytest.mark.parametrize("shared", [True, False])
def test_losing_writer_does_not_damage_committed_folder(
    store: Storage, overtaken_write: int, shared: bool
) -> None:
    other = {**FILES, "b.bin": b"of the loser", "README.md": b"card of the loser\n"}
    racing = OvertakenStorage(Path(store.uri), overtaken_write)
    if not shared and overtaken_write > 2:
        return  # a run has one writer, whose own files are replaced until it commits
    with pytest.raises(ArtifactError, match="already holds"):
        write_manifest_folder(racing, other, replace_uncommitted=not shared)
    if store.exists(MANIFEST):
        assert read_manifest_folder(store) == FILES


def test_shared_folder_with_leftover_of_other_writer_names_remedy(store: Storage) -> None:
    store.write("a.bin", b"of another writer")
    with pytest.raises(
        ArtifactError, match=r"already holds another a\.bin\. Delete that folder if no other job"
    ):
        write_manifest_folder(store, FILES, replace_uncommitted=False)
    store.delete("a.bin")
    store.write("b.bin", FILES["b.bin"])
    write_manifest_folder(store, FILES, replace_uncommitted=False)
    assert read_manifest_folder(store) == FILES


def test_read_manifest_folder_respects_limits_and_names(store: Storage) -> None:
    write_manifest_folder(store, FILES)
    store.write("unlisted", b"not read")
    assert read_manifest_folder(store) == FILES
    assert read_manifest_folder(store, names=["a.bin"], total_limit=5) == {"a.bin": b"alpha"}
    for limits in ({"file_limit": 4}, {"total_limit": 9}, {"names": ["unlisted"]}):
        with pytest.raises(ArtifactError):
            read_manifest_folder(store, **limits)


@pytest.mark.parametrize("damage", [b"alphA", b"alph", b"alphaa", None])
def test_read_manifest_folder_with_damaged_or_missing_file_raises(
    store: Storage, damage: bytes | None
) -> None:
    write_manifest_folder(store, FILES)
    if damage is None:
        store.delete("a.bin")
    else:
        store.write("a.bin", damage)
    with pytest.raises(ArtifactError):
        read_manifest_folder(store)


def _manifest(**changes: object) -> bytes:
    entry: dict[str, object] = {"name": "a", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    extra = {k: v for k, v in changes.items() if k in ("format", "files", "more")}
    entry |= {k: v for k, v in changes.items() if k not in extra}
    return json.dumps({"format": "mtlsign/folder/v1", "files": [entry], **extra}).encode()


def test_manifest_bytes_have_fixed_format() -> None:
    assert manifest_bytes({"b": b"", "a": b"x"}) == (
        b'{"files":['
        b'{"name":"a","sha256":"2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881","size":1},'
        b'{"name":"b","sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0}],'
        b'"format":"mtlsign/folder/v1"}\n'
    )
    assert parse_manifest(_manifest())["a"].size == 1
    for files in ({}, {"manifest.json": b""}, {"../a": b""}, {"a/b": b""}, {"": b""}):
        with pytest.raises(ArtifactError):
            manifest_bytes(files)


@pytest.mark.parametrize(
    "data",
    [
        _manifest(name="../a"),
        _manifest(name="/a"),
        _manifest(name="a/b"),
        _manifest(name="manifest.json"),
        _manifest(name=1),
        _manifest(size=-1),
        _manifest(size=True),
        _manifest(size=1.0),
        _manifest(size=2**63),
        _manifest(size="1"),
        _manifest(sha256="0"),
        _manifest(sha256="A" * 64),
        _manifest(sha256=None),
        _manifest(extra=1),
        _manifest(more=1),
        _manifest(format="mtlsign/folder/v2"),
        _manifest(files=[]),
        _manifest(files={}),
        _manifest(files=[1]),
        _manifest(files=[{}] * 1001),
        b"",
        b"null",
        b"[]",
        b"\xff",
        b"[" * 200_000,
        b"1" * 9999,
        b'{"files":NaN}',
        _manifest().replace(b'"size": 1', b'"size": 1, "size": 2'),
    ],
)
def test_parse_manifest_hostile_bytes_raise_artifact_error(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        parse_manifest(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.binary(max_size=80)
    | JSON.map(lambda v: json.dumps(v).encode())
    | JSON.map(lambda v: _manifest(files=v))
    | st.dictionaries(st.sampled_from(["name", "size", "sha256"]), JSON).map(lambda v: _manifest(**v))
)
def test_parse_manifest_of_any_bytes_raises_only_artifact_error(data: bytes) -> None:
    try:
        entries = parse_manifest(data)
    except ArtifactError:
        return
    assert all("/" not in name and entry.size >= 0 for name, entry in entries.items())


def test_read_manifest_folder_with_oversized_manifest_raises(store: Storage) -> None:
    store.write(MANIFEST, b" " * (2**20 + 1))
    with pytest.raises(ArtifactError, match="more than the 1048576 bytes"):
        read_manifest_folder(store)
