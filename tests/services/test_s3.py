"""`storage` and `artifact` against a real S3 server: whole objects, one winner, clear and quick refusals."""

from __future__ import annotations

import pickle
import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

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


def test_what_is_written_is_read_listed_and_deleted(store: Storage) -> None:
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
    for name in ("runs", "two.txt", "never-there", "large"):
        store.delete(name)
    assert store.list() == []


def test_what_is_too_large_or_missing_is_not_read(store: Storage) -> None:
    store.write("big", b"x" * 10)
    for name in ("big", "absent"):
        with pytest.raises(ArtifactError):
            store.read(name, 9)


def test_of_eight_racing_writers_one_wins(store: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.write("once", b"%d" % i, if_absent=True), range(8)))
    assert sum(won) == 1 and store.read("once", 9) == b"%d" % won.index(True)
    assert not store.write("once", b"late", if_absent=True)


def test_check_writable_passes_and_leaves_nothing(store: Storage) -> None:
    store.check_writable()
    assert store.list() == []


def test_the_folder_rule_holds(store: Storage) -> None:
    folder, files = store.child("runs/one"), {"a": b"alpha", "b": b""}
    folder.write("a", b"left by a crash")
    with pytest.raises(ArtifactError, match="no complete folder"):
        read_manifest_folder(folder)
    write_manifest_folder(folder, files)
    write_manifest_folder(folder, files)
    assert read_manifest_folder(folder) == files and folder.list() == ["a", "b", MANIFEST]
    with pytest.raises(ArtifactError, match="already holds"):
        write_manifest_folder(folder, {"a": b"other"})
    folder.write("a", b"ALPHA")
    with pytest.raises(ArtifactError, match="is not what"):
        read_manifest_folder(folder)
    store.delete("runs/one")
    assert folder.list() == []


def test_models_and_kits_go_there_and_back(store: Storage, s3: S3Server) -> None:
    tensors, secret = {"w": torch.arange(5.0)}, EncryptionSecret.from_kit_key(bytes(32))
    digest = write_model(store, tensors, {"a": 1}, "card")
    bare = store.uri.partition("?")[0] + f"/models/{digest}"
    for place in (
        store.child(f"models/{digest}").uri,
        store.uri.replace("?", f"/models/{digest}/model.safetensors?"),
    ):
        found = read_model(place)
        assert found.digest == digest and torch.equal(found.tensors["w"], tensors["w"])
    assert read_model(bare, endpoint=s3.endpoint).config == {"a": 1}
    kit = OwnerKit(
        KeyOpening(b"{}", b"\1" * 32, b"\2" * 64), b"reference", b"w0", None, {"model_digest": digest}
    )
    kit_id = write_kit(store, kit, secret)
    assert read_kit(store.child(f"kits/{kit_id}").uri, secret) == kit


def test_pyarrow_sees_the_same_files_through_ray_path(store: Storage) -> None:
    fs = pytest.importorskip("pyarrow.fs")
    store.write("from-boto3", b"1")
    there, path = fs.FileSystem.from_uri(store.ray_path())
    with there.open_input_stream(f"{path}/from-boto3") as stream:
        assert stream.read() == b"1"
    with there.open_output_stream(f"{path}/from-pyarrow") as stream:
        stream.write(b"2")
    assert store.read("from-pyarrow", 1) == b"2"


def test_the_wrong_key_is_a_storage_error_without_secrets(
    store: Storage, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-hush")
    with pytest.raises(StorageError, match=r"^storage: .*; check AWS_ACCESS_KEY_ID") as caught:
        open_storage(store.uri).check_writable()
    assert "hush" not in str(caught.value) and s3.env["AWS_ACCESS_KEY_ID"] not in str(caught.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"^storage: .*AWS_SECRET_ACCESS_KEY"):
        open_storage(store.uri).check_writable()


def test_a_missing_bucket_is_a_storage_error(store: Storage, s3: S3Server) -> None:
    elsewhere = open_storage("s3://no-such-bucket/x", endpoint=s3.endpoint)
    with pytest.raises(StorageError, match=r"^storage: "):
        elsewhere.check_writable()
    with pytest.raises((StorageError, ArtifactError)):
        elsewhere.read("a", 1)


@pytest.mark.parametrize("silent", [False, True])
def test_an_unreachable_or_silent_server_fails_within_about_ten_seconds(store: Storage, silent: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        nowhere = open_storage("s3://bucket/x", endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot be reached .*; start it, or correct the endpoint"):
            nowhere.check_writable()
        assert time.monotonic() - begin < 12
