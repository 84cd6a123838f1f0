"""Tests of embedding on a real S3 server: the same model as in a local folder, no credentials in any file."""

from __future__ import annotations

import json

import pytest

from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import read_model
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import read_kit
from tests.helpers.job_harness import FinishedRun, JobLauncher
from tests.helpers.seaweedfs_server import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.services, pytest.mark.timeout(1800)]


def test_embedding_into_s3_gives_same_model_as_local_folder(
    s3: S3Server, jobs: JobLauncher, baseline_run: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    storage = f"s3://{s3.bucket}/embed"
    job = jobs.embed("--run", "s", "--json", "--endpoint", s3.endpoint, storage=storage, **s3.env)
    result = json.loads(job.wait())
    assert job.err == ""
    assert result["model_digest"] == baseline_run.result["model_digest"]
    store = open_storage(storage, endpoint=s3.endpoint)
    names = store.list()
    kit = result["kit"].partition("?")[0].rsplit("/", 1)[1]
    assert set(names) == {
        *(
            f"models/{result['model_digest']}/{f}"
            for f in ("model.safetensors", "config.json", "README.md", "manifest.json")
        ),
        *(f"kits/{kit}/{f}" for f in ("kit.sealed", "manifest.json", "owner.json")),
        *(
            f"runs/s/{f}"
            for f in ("settings.json", "result.json", "metrics.json", "report.html", "manifest.json")
        ),
    }
    assert json.loads(store.read("runs/s/result.json", 2**20)) == result
    assert read_model(result["model_path"]).digest == result["model_digest"]
    secret = EncryptionSecret.from_kit_key(jobs.identity.kit_key)
    kit_in_s3, local_kit = read_kit(result["kit"], secret), read_kit(baseline_run.result["kit"], secret)
    assert kit_in_s3.opening == local_kit.opening
    credentials = [s3.env["AWS_SECRET_ACCESS_KEY"].encode(), s3.env["AWS_ACCESS_KEY_ID"].encode()]
    logs = [p for p in jobs.ray.rglob("*") if p.is_file() and "logs" in p.parts]
    contents = [store.read(name, 2**26) for name in names] + [p.read_bytes() for p in (*logs, job.stdout)]
    assert logs and not [1 for data in contents for word in credentials if word in data]
