"""Tests of storage on a real S3 server: complete objects, conditional creation, quick and clear errors."""

from __future__ import annotations

import pickle
import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pyarrow import fs

from mtlsign.errors import ArtifactError, StorageError
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import MANIFEST, read_manifest_folder, write_manifest_folder
from mtlsign.storage.model_folder import read_model, write_model
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import OwnerKit, read_kit, write_kit
from tests.helpers.seaweedfs_server import S3Server

pytestmark = pytest.mark.services


@pytest.fixture
def store(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return open_storage(f"s3://{s3.bucket}/{secrets.token_hex(4)}", endpoint=s3.endpoint)


def test_s3_storage_written_file_is_read_listed_and_deleted(store: Storage) -> None:
    assert store.list() == [] and not store.exists("two.txt")
    assert store.write("runs/x/one é.txt", b"1") and store.write("two.txt", b"2")
    assert store.write("two.txt", b"22") and store.read("two.txt", 2) == b"22"
    assert store.list() == ["runs/x/one é.txt", "two.txt"] and store.child("runs").list("x") == [
        "x/one é.txt"
    ]
    assert store.exists("two.txt") and not store.exists("runs")
    large = secrets.token_bytes(20 * 2**20)
    store.write("large", large)
    assert pickle.loads(pickle.dumps(store)).read("large", len(large)) == large
    for name in ("runs", "two.txt", "missing", "large"):
        store.delete(name)
    assert store.list() == []


def test_read_of_large_or_missing_file_raises_artifact_error(store: Storage) -> None:
    store.write("big", b"x" * 10)
    for name in ("big", "absent"):
        with pytest.raises(ArtifactError):
            store.read(name, 9)


def test_write_if_absent_with_racing_writers_succeeds_once(store: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        successes = list(pool.map(lambda i: store.write("once", b"%d" % i, if_absent=True), range(8)))
    assert sum(successes) == 1 and store.read("once", 9) == b"%d" % successes.index(True)
    assert not store.write("once", b"late", if_absent=True)


def test_check_writable_leaves_no_files(store: Storage) -> None:
    store.check_writable()
    assert store.list() == []


def test_manifest_folder_is_committed_by_its_manifest(store: Storage) -> None:
    folder, files = store.child("runs/one"), {"a": b"alpha", "b": b""}
    folder.write("a", b"from a crashed run")
    with pytest.raises(ArtifactError, match="not a committed folder"):
        read_manifest_folder(folder)
    write_manifest_folder(folder, files)
    write_manifest_folder(folder, files)
    assert read_manifest_folder(folder) == files and folder.list() == ["a", "b", MANIFEST]
    with pytest.raises(ArtifactError, match="already holds"):
        write_manifest_folder(folder, {"a": b"other"})
    folder.write("a", b"ALPHA")
    with pytest.raises(ArtifactError, match="does not match"):
        read_manifest_folder(folder)
    store.delete("runs/one")
    assert folder.list() == []


def test_read_model_and_read_kit_return_written_artifacts(store: Storage, s3: S3Server) -> None:
    tensors, secret = {"w": torch.arange(5.0)}, EncryptionSecret.from_kit_key(bytes(32))
    digest = write_model(store, tensors, {"a": 1}, "card")
    without_options = store.uri.partition("?")[0] + f"/models/{digest}"
    for location in (
        store.child(f"models/{digest}").uri,
        store.uri.replace("?", f"/models/{digest}/model.safetensors?"),
    ):
        model = read_model(location)
        assert model.digest == digest and torch.equal(model.tensors["w"], tensors["w"])
    assert read_model(without_options, endpoint=s3.endpoint).config == {"a": 1}
    kit = OwnerKit(
        KeyOpening(b"{}", b"\1" * 32, b"\2" * 64), b"reference", b"w0", None, {"model_digest": digest}
    )
    kit_id = write_kit(store, kit, secret)
    assert read_kit(store.child(f"kits/{kit_id}").uri, secret) == kit


def test_ray_path_names_same_files_for_pyarrow(store: Storage) -> None:
    store.write("from-boto3", b"1")
    filesystem, path = fs.FileSystem.from_uri(store.ray_path())
    with filesystem.open_input_stream(f"{path}/from-boto3") as stream:
        assert stream.read() == b"1"
    with filesystem.open_output_stream(f"{path}/from-pyarrow") as stream:
        stream.write(b"2")
    assert store.read("from-pyarrow", 1) == b"2"


def test_wrong_credentials_raise_storage_error_without_secrets(
    store: Storage, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-hush")
    with pytest.raises(StorageError, match=r"^storage: .*\. Check AWS_ACCESS_KEY_ID") as caught:
        open_storage(store.uri).check_writable()
    assert "hush" not in str(caught.value) and s3.env["AWS_ACCESS_KEY_ID"] not in str(caught.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"^storage: .*AWS_SECRET_ACCESS_KEY"):
        open_storage(store.uri).check_writable()


def test_missing_bucket_raises_storage_error(store: Storage, s3: S3Server) -> None:
    missing_bucket = open_storage("s3://no-such-bucket/x", endpoint=s3.endpoint)
    with pytest.raises(StorageError, match=r"^storage: "):
        missing_bucket.check_writable()
    with pytest.raises((StorageError, ArtifactError)):
        missing_bucket.read("a", 1)


@pytest.mark.parametrize("silent", [False, True])
def test_unreachable_or_silent_server_fails_within_about_ten_seconds(store: Storage, silent: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        unreachable = open_storage("s3://bucket/x", endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot be reached .*\. Start it or correct the endpoint"):
            unreachable.check_writable()
        assert time.monotonic() - start < 12
