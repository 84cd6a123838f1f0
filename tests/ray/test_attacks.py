"""Tests of the attack backend on Ray: equal rows, no secret in logs, Ctrl-C and resume."""

from __future__ import annotations

import base64
import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import read_kit
from tests.helpers.job_harness import FinishedRun, Job, JobLauncher

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

ATTACKS = "int8,ftal:epochs=1,spoil:steps=2,bn_fold,average_models,transpose_input"
#: Columns that may differ between two runs of the same attacks.
UNSTABLE_COLUMNS = {"seconds", "model", "model_digest"}


def target(jobs: JobLauncher, baseline_run: FinishedRun, storage: Path) -> list[str]:
    """Return the flags that every run here needs."""
    always = ["--model", baseline_run.result["model_path"], "--kit", baseline_run.result["kit"]]
    return [*always, *jobs.as_owner, "--storage", str(storage)]


def start(jobs: JobLauncher, baseline_run: FinishedRun, storage: Path, *flags: str) -> Job:
    return jobs.python("jobs/attack.py", *target(jobs, baseline_run, storage), *flags)


def table(storage: Path, run: str) -> list[dict[str, str]]:
    return list(csv.DictReader((storage / "runs" / run / "attacks.csv").open()))


def test_ray_attack_backend_gives_rows_of_one_process_and_logs_no_secret(
    jobs: JobLauncher, baseline_run: FinishedRun, tmp_path: Path
) -> None:
    # The job starts a cluster that ends with it, and runs two attacks at a time.
    job = start(
        jobs, baseline_run, tmp_path, "--attacks", ATTACKS, "--run", "ray", "--workers", "2",
        "--cpus-per-worker", "1", "--json",
    )  # fmt: skip
    result: dict[str, Any] = json.loads(job.wait())
    assert job.err == "" and result["not_applicable"] == 1 and len(result["rows"]) == 7
    start(
        jobs, baseline_run, tmp_path, "--attacks", ATTACKS, "--run", "plain", "--workers", "0", "--quiet"
    ).wait()
    for ray_row, plain_row in zip(table(tmp_path, "ray"), table(tmp_path, "plain"), strict=True):
        for column in set(ray_row) - UNSTABLE_COLUMNS:
            assert ray_row[column] == plain_row[column], (ray_row["attack"], column)
    opening = read_kit(
        baseline_run.result["kit"], EncryptionSecret.from_kit_key(jobs.identity.kit_key)
    ).opening
    nonce = bytes.fromhex(json.loads(opening.spec)["nonce"])
    forms = [opening.spec, jobs.passphrase]
    for raw in (opening.key(), opening.signature, nonce, jobs.identity.kit_key, jobs.identity._seed):
        forms += [raw, raw.hex().encode(), base64.b64encode(raw)]
    logs = [p for p in jobs.ray.rglob("*") if p.is_file() and "logs" in p.parts]
    assert logs, "Ray's logs are not in the expected folder"
    places = [*(p for p in tmp_path.rglob("*") if p.is_file()), *logs, job.stdout, job.stderr]
    for place in places:
        data = place.read_bytes()
        assert not any(form in data for form in forms), place


@pytest.mark.slow
def test_ray_attack_backend_interrupted_keeps_rows_and_resumes(
    jobs: JobLauncher, baseline_run: FinishedRun, tmp_path: Path
) -> None:
    attacks = "int8,ftal:epochs=3000,int4"
    job = start(jobs, baseline_run, tmp_path, "--attacks", attacks, "--run", "cut", "--workers", "1")
    job.until(lambda: (tmp_path / "runs/cut/attacks.csv").exists() and len(table(tmp_path, "cut")) == 2)
    os.kill(job.process.pid, signal.SIGINT)
    job.wait(130, timeout=120)
    assert [row["attack"] for row in table(tmp_path, "cut")] == ["none", "int8"]
    assert job.err.splitlines()[-1].startswith("interrupted") and "Traceback" not in job.err
    settings = tmp_path / "runs/cut/settings.json"
    settings.write_text(settings.read_text().replace("epochs=3000", "epochs=1"))
    resumed = start(jobs, baseline_run, tmp_path, "--resume", "cut", "--workers", "0")
    resumed.wait()
    assert [row["attack"] for row in table(tmp_path, "cut")] == ["none", "int8", "ftal", "int4"]
    assert "2 of them are finished already" in resumed.err
