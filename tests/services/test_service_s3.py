"""Models in a real S3: allowed prefixes, one download for many claims, sizes checked before reading."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.service import ServiceSettings
from mtlsign.service.fetch.model_cache import ModelFetcher
from mtlsign.service.problems import Problem
from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import model_bytes, write_model
from tests.helpers import seaweedfs_server

pytestmark = pytest.mark.services


def test_fetch_model_from_s3_checks_prefix_size_and_manifest(
    s3: seaweedfs_server.S3Server, marked_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    _, result = marked_model
    data = model_bytes(result.tensors)
    digest = hashlib.sha256(data).hexdigest()
    storage = open_storage(f"s3://{s3.bucket}/service", endpoint=s3.endpoint)
    assert write_model(storage, result.tensors, {}, "") == digest
    storage.write("bare.safetensors", data)
    storage.write("other.safetensors", b"x" * (2**20 + 1))
    settings = ServiceSettings.of(
        {
            "state_dir": tmp_path,
            "allowed_locations": [f"s3://{s3.bucket}/service"],
            "endpoint": s3.endpoint,
            "max_model_mb": 1,
        }
    )
    fetcher = ModelFetcher(settings)
    for name in (f"models/{digest}", "bare.safetensors"):
        fetched, path, _ = fetcher.fetch_model(f"s3://{s3.bucket}/service/{name}")
        assert fetched == digest and path.read_bytes() == data
    assert fetcher.downloads == 2
    folder = f"s3://{s3.bucket}/service/models/{digest}"
    fetcher._recent[folder] = (0.0, digest)  # expired
    assert fetcher.fetch_model(folder)[2] and fetcher.downloads == 2  # the manifest repeats the digest
    fetcher._recent.clear()
    assert not fetcher.fetch_model(folder)[2] and fetcher.downloads == 3  # the manifest alone is not trusted
    for location, kind in {
        f"s3://{s3.bucket}/service/other.safetensors": "too-large",
        f"s3://{s3.bucket}/service/none.safetensors": "unreachable",
        f"s3://{s3.bucket}/elsewhere/bare.safetensors": "pointer-refused",
        f"s3://{s3.bucket}/service/bare.safetensors?endpoint_override=127.0.0.1:1": "pointer-refused",
    }.items():
        with pytest.raises(Problem) as caught:
            fetcher.fetch_model(location)
        assert caught.value.kind == kind, location
