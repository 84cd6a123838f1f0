"""Tests of embedding on a real S3 server: the same model as in a local folder, no credentials in any file."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import read_model
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import read_kit
from tests.helpers.job_harness import FinishedRun, JobLauncher
from tests.helpers.seaweedfs_server import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.services, pytest.mark.timeout(1800)]


#: Flags of a run with one worker and one checkpoint in each phase; its watermark is rejected.
SHORT = shlex.split(
    "--task digits --width 8 --head keyed --key-size 128 --lambda2 0 --phase1.epochs 1 --phase1.batch 64 "
    "--phase2.steps 51 --phase2.batch 16 --insecure-test-key --workers 1 --cpus-per-worker 1 --json"
)


@pytest.fixture
def _credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)


def check_stored_run(s3: S3Server, jobs: JobLauncher, output: Path, local: dict[str, Any], run: str) -> None:
    """Check that a run in S3 has the model, key and files of the local one, and that no file has credentials.

    Args:
        s3: the server.
        jobs: the launcher, with the owner and Ray's logs.
        output: standard output of the job.
        local: result of the local run.
        run: name of the run and of its folder in the bucket.
    """
    result = json.loads(output.read_text())
    assert result["model_digest"] == local["model_digest"]
    store = open_storage(f"s3://{s3.bucket}/{run}", endpoint=s3.endpoint)
    names = store.list()
    kit = result["kit"].partition("?")[0].rsplit("/", 1)[1]
    run_files = ("settings.json", "result.json", "metrics.json", "report.html", "manifest.json")
    assert set(names) == {
        *(
            f"models/{result['model_digest']}/{f}"
            for f in ("model.safetensors", "config.json", "README.md", "manifest.json")
        ),
        *(f"kits/{kit}/{f}" for f in ("kit.sealed", "manifest.json", "owner.json")),
        *(f"runs/{run}/{f}" for f in run_files),
    }
    assert json.loads(store.read(f"runs/{run}/result.json", 2**20)) == result
    assert read_model(result["model_path"]).digest == result["model_digest"]
    secret = EncryptionSecret.from_kit_key(jobs.identity.kit_key)
    kit_in_s3, local_kit = read_kit(result["kit"], secret), read_kit(local["kit"], secret)
    assert kit_in_s3.opening == local_kit.opening
    credentials = [s3.env["AWS_SECRET_ACCESS_KEY"].encode(), s3.env["AWS_ACCESS_KEY_ID"].encode()]
    logs = [p for p in jobs.ray.rglob("*") if p.is_file() and "logs" in p.parts]
    contents = [store.read(name, 2**26) for name in names] + [p.read_bytes() for p in (*logs, output)]
    assert logs and not [1 for data in contents for word in credentials if word in data]


@pytest.mark.usefixtures("_credentials")
def test_short_embedding_into_s3_gives_same_model_as_local_folder(
    s3: S3Server, jobs: JobLauncher, tmp_path: Path
) -> None:
    with jobs.session(**s3.env) as session:
        always = [*SHORT, *jobs.as_owner, "--run", "short"]
        at_s3 = ["--storage", f"s3://{s3.bucket}/short", "--endpoint", s3.endpoint]
        job = session.run("embed", *always, *at_s3, code=3)
        assert job.err.startswith("error: The watermark of the marked model is rejected")
        assert job.err.count("\n") == 1
        in_one_process = ["--storage", str(tmp_path), "--workers", "0"]
        local = json.loads(session.run("embed", *always, *in_one_process, code=3).out)
    check_stored_run(s3, jobs, job.stdout, local, "short")


@pytest.mark.slow
@pytest.mark.usefixtures("_credentials")
def test_accepted_embedding_into_s3_gives_same_model_as_local_folder(
    s3: S3Server, jobs: JobLauncher, baseline_run: FinishedRun
) -> None:
    storage = f"s3://{s3.bucket}/accepted"
    job = jobs.embed("--run", "accepted", "--json", "--endpoint", s3.endpoint, storage=storage, **s3.env)
    job.wait()
    assert job.err == ""
    check_stored_run(s3, jobs, job.stdout, baseline_run.result, "accepted")
