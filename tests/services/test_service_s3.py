"""Models in a real S3: allowed prefixes only, one download for many claims, sizes known before reading."""

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


def test_models_in_s3(
    s3: seaweedfs_server.S3Server, marked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    _, done = marked
    data = model_bytes(done.tensors)
    digest = hashlib.sha256(data).hexdigest()
    place = open_storage(f"s3://{s3.bucket}/service", endpoint=s3.endpoint)
    assert write_model(place, done.tensors, {}, "") == digest
    place.write("bare.safetensors", data)
    place.write("other.safetensors", b"x" * (2**20 + 1))
    settings = ServiceSettings.of(
        {"state": tmp_path, "allow": f"s3://{s3.bucket}/service", "endpoint": s3.endpoint, "max_model_mb": 1}
    )
    library = ModelFetcher(settings)
    for pointer in (f"models/{digest}", "bare.safetensors"):
        found, path, _ = library.model(f"s3://{s3.bucket}/service/{pointer}")
        assert found == digest and path.read_bytes() == data
    assert library.downloads == 2
    whole = f"s3://{s3.bucket}/service/models/{digest}"
    library._known[whole] = (0.0, digest)  # its time is up
    assert library.model(whole)[2] and library.downloads == 2  # the manifest names what it brought before
    library._known.clear()
    assert not library.model(whole)[2] and library.downloads == 3  # else a manifest's word is not enough
    for pointer, kind in {
        f"s3://{s3.bucket}/service/other.safetensors": "too-large",
        f"s3://{s3.bucket}/service/none.safetensors": "unreachable",
        f"s3://{s3.bucket}/elsewhere/bare.safetensors": "pointer-refused",
        f"s3://{s3.bucket}/service/bare.safetensors?endpoint_override=127.0.0.1:1": "pointer-refused",
    }.items():
        with pytest.raises(Problem) as caught:
            library.model(pointer)
        assert caught.value.kind == kind, pointer
