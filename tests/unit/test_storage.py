"""Storage: atomic, write-once, and closed to hostile names and locations."""

from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.errors import ArtifactError, StorageError
from mtlsign.storage.base import Storage
from mtlsign.storage.local import LocalStorage
from mtlsign.storage.locations import open_file, open_storage


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def _no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


def test_what_is_written_is_read_listed_and_deleted(store: Storage) -> None:
    assert store.list() == []
    assert store.write("runs/x/one.txt", b"1") and store.write("two.txt", b"2")
    assert store.write("two.txt", b"22")
    assert store.read("two.txt", 2) == b"22"
    assert store.list() == ["runs/x/one.txt", "two.txt"]
    assert store.list("runs") == ["runs/x/one.txt"] and store.child("runs").list() == ["x/one.txt"]
    assert store.exists("two.txt") and not store.exists("runs") and not store.exists("three.txt")
    store.delete("runs")
    store.delete("two.txt")
    store.delete("never-there")
    assert store.list() == []


def test_only_if_new_lets_exactly_one_of_many_writers_win(store: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.write("once", b"%d" % i, if_absent=True), range(8)))
    assert sum(won) == 1
    assert store.read("once", 9) == b"%d" % won.index(True)
    assert store.list() == ["once"]


def test_read_refuses_what_is_too_large_missing_or_no_plain_file(store: Storage, tmp_path: Path) -> None:
    store.write("big", b"x" * 10)
    os.mkfifo(tmp_path / "store" / "pipe")
    for name in ("big", "absent", "pipe", "big/below"):
        with pytest.raises(ArtifactError):
            store.read(name, 9)
    with pytest.raises(StorageError):
        store.child("folder").write("../../out", b"")


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    open_storage(str(tmp_path / "new" / "deep")).check_writable()
    assert list(tmp_path.iterdir()) == []


def test_check_writable_names_the_setting_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"storage: cannot write .*; choose a folder"):
        open_storage(str(tmp_path / "file")).check_writable()

    def overwrites(self: LocalStorage, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        return True

    monkeypatch.setattr(LocalStorage, "write", overwrites)
    with pytest.raises(StorageError, match="If-None-Match"):
        open_storage(str(tmp_path)).check_writable()


@pytest.mark.parametrize(
    "name", ["", "/etc/x", "a//b", "../a", "a/../b", ".", "a\\b", "a\0b", "a\nb", ".tmp-x", "x" * 999]
)
def test_unsafe_names_are_refused(store: Storage, name: str) -> None:
    for use in (lambda: store.write(name, b""), lambda: store.read(name, 1), lambda: store.child(name)):
        with pytest.raises(StorageError):
            use()


@given(st.text(max_size=30))
def test_no_name_leaves_the_folder(name: str) -> None:
    root = Path("/nowhere/root")
    try:
        path = LocalStorage(root).child(name).root
    except StorageError:
        return
    assert Path(os.path.normpath(path)).is_relative_to(root) and path != root


SERVER = "endpoint_override=127.0.0.1:8333&scheme=http&region=us-east-1"


def test_one_endpoint_serves_boto3_and_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    full = f"s3://bucket/runs/one?{SERVER}"
    assert open_storage(full).ray_path() == full
    assert open_storage("s3://bucket/runs", endpoint="http://127.0.0.1:8333/").child("one").ray_path() == full
    assert open_storage(full, endpoint="http://127.0.0.1:8333").uri == full
    assert open_storage("s3://bucket").ray_path() == "s3://bucket"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:8333")
    assert open_storage("s3://bucket/runs/one").uri == full
    assert open_storage(f"s3://bucket?{SERVER.replace('8333', '9')}").uri.count("127.0.0.1:9") == 1
    with pytest.raises(StorageError, match="give it once"):
        open_storage(full, endpoint="http://127.0.0.1:8334")


def test_a_file_location_is_split_into_folder_and_name(tmp_path: Path) -> None:
    folder, name = open_file(f"s3://bucket/m/x.safetensors?{SERVER}")
    assert (folder.uri, name) == (f"s3://bucket/m?{SERVER}", "x.safetensors")
    folder, name = open_file(str(tmp_path / "x.safetensors"))
    assert (folder.uri, name) == (str(tmp_path), "x.safetensors")
    assert open_file("x.safetensors")[0].uri == os.getcwd()
    for bad in ("", "s3://bucket", "s3://", "dir/"):
        with pytest.raises(StorageError):
            open_file(bad)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "gs://b/x",
        "s3:bucket",
        "s3://",
        "s3://B/x",
        "s3://bucket/a b",
        "s3://bucket/../x",
        "s3://bucket/x?a=b",
        "s3://bucket/x?region=a&region=b",
        "s3://bucket/x?scheme=ftp&endpoint_override=h:1",
        "s3://bucket/x#f",
        "s3://bucket/x?endpoint_override=h/path",
        "s3://bucket/x?endpoint_override=u:p@h",
        "s3://[bucket",
        "s3://bucket?x",
        "s3://bucket/x?region=EU%20x",
    ],
)
def test_malformed_locations_are_refused(uri: str) -> None:
    with pytest.raises(StorageError):
        open_storage(uri)


@pytest.mark.parametrize(
    "uri", ["s3://AKIA1:hush@bucket/x", "s3://bucket/x?access_key=AKIA1&secret_key=hush"]
)
def test_credentials_in_a_location_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID") as caught:
        open_storage(uri)
    assert "hush" not in str(caught.value) and "AKIA1" not in str(caught.value)


@given(st.text(max_size=40), st.text(max_size=20))
def test_any_location_opens_or_is_a_storage_error(tail: str, endpoint: str) -> None:
    for uri in (tail, "s3://" + tail, "s3://bucket/x?" + tail):
        try:
            opened = open_storage(uri, endpoint=endpoint or None)
        except StorageError:
            continue
        assert open_storage(opened.uri).uri == opened.uri


def test_a_refusing_s3_server_fails_fast_and_pickles_without_its_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "some-secret")
    store = open_storage("s3://bucket/x", endpoint="http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(StorageError, match=r"^storage: http://127.0.0.1:9 cannot be reached") as caught:
        store.check_writable()
    assert time.monotonic() - begin < 10
    assert b"some-" not in pickle.dumps(store) and "some-" not in repr(store) + str(caught.value)


def test_a_generous_limit_costs_no_memory(store: Storage) -> None:
    """Reading allocated as much as the limit: a checkpoint under a 32 GiB limit could not be read at all."""
    store.write("a", b"1234")
    assert store.read("a", 2**60) == b"1234"
