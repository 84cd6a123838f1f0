"""Tests of storage locations, local and S3. No server is contacted."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.errors import StorageError
from mtlsign.storage.locations import has_suffix, open_file, open_storage, path_of

SERVER = "endpoint_override=127.0.0.1:8333&scheme=http&region=us-east-1"


@pytest.fixture(autouse=True)
def _unset_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


def test_open_storage_endpoint_is_the_same_for_boto3_and_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    full = f"s3://bucket/runs/one?{SERVER}"
    assert open_storage(full).ray_path() == full
    assert open_storage("s3://bucket/runs", endpoint="http://127.0.0.1:8333/").child("one").ray_path() == full
    assert open_storage(full, endpoint="http://127.0.0.1:8333").uri == full
    assert open_storage("s3://bucket").ray_path() == "s3://bucket"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:8333")
    assert open_storage("s3://bucket/runs/one").uri == full
    assert open_storage(f"s3://bucket?{SERVER.replace('8333', '9')}").uri.count("127.0.0.1:9") == 1
    with pytest.raises(StorageError, match="Name the server once"):
        open_storage(full, endpoint="http://127.0.0.1:8334")


def test_open_storage_prefix_is_literal_and_escaped_for_ray() -> None:
    opened = open_storage("s3://bucket/my models/größe 100%20")
    assert opened.uri == "s3://bucket/my models/größe 100%20"
    assert opened.ray_path() == "s3://bucket/my%20models/gr%C3%B6%C3%9Fe%20100%2520"
    assert opened.child("run é").uri.endswith("/run é")
    with pytest.raises(StorageError, match="cannot be part of a location"):
        opened.child("a#b")
    folder, name = open_file("s3://bucket/my models/x ü.safetensors")
    assert (folder.uri, name) == ("s3://bucket/my models", "x ü.safetensors")


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("localhost:9000", "lacks its scheme. Write http://localhost:9000 "),
        ("minio", "lacks its scheme"),
        ("ftp://h:1", "Write http://HOST:PORT or https://HOST:PORT"),
        ("http://h:9000/path", "Write http://HOST:PORT"),
        ("http//h:9000", "Write http://HOST:PORT"),
    ],
)
def test_open_storage_invalid_endpoint_names_remedy(
    endpoint: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=f"^endpoint: .*{message}"):
        open_storage("s3://bucket/x", endpoint=endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StorageError, match=message):
        open_storage("s3://bucket/x")


def test_open_file_splits_location_into_folder_and_name(tmp_path: Path) -> None:
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
        "s3://bucket/a//b",
        "s3://bucket/a\tb",
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
def test_open_storage_malformed_location_raises_storage_error(uri: str) -> None:
    with pytest.raises(StorageError):
        open_storage(uri)


@pytest.mark.parametrize(
    "uri", ["s3://AKIA1:hush@bucket/x", "s3://bucket/x?access_key=AKIA1&secret_key=hush"]
)
def test_open_storage_location_with_credentials_raises_without_repeating_them(uri: str) -> None:
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID") as caught:
        open_storage(uri)
    assert "hush" not in str(caught.value) and "AKIA1" not in str(caught.value)


@given(st.text(max_size=40), st.text(max_size=20))
def test_open_storage_of_any_text_opens_or_raises_storage_error(tail: str, endpoint: str) -> None:
    for uri in (tail, "s3://" + tail, "s3://bucket/x?" + tail):
        try:
            opened = open_storage(uri, endpoint=endpoint or None)
        except StorageError:
            continue
        assert open_storage(opened.uri).uri == opened.uri


def test_s3_storage_unreachable_server_fails_fast_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "some-secret")
    store = open_storage("s3://bucket/x", endpoint="http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"^storage: http://127.0.0.1:9 cannot be reached") as caught:
        store.check_writable()
    assert time.monotonic() - start < 10
    assert b"some-" not in pickle.dumps(store) and "some-" not in repr(store) + str(caught.value)


def test_path_of_and_has_suffix_ignore_options_of_s3_locations() -> None:
    location = f"s3://bucket/m/x.safetensors?{SERVER}"
    assert path_of(location) == "s3://bucket/m/x.safetensors" and has_suffix(location, ".safetensors")
    assert path_of("/data/a?b.sealed") == "/data/a?b.sealed" and has_suffix("/data/a?b.sealed", ".sealed")
    assert not has_suffix("s3://bucket/m?x=.sealed", ".sealed")
