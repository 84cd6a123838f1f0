"""Attacks and sweeps on Ray give the rows of one process, and leave no secret in logs.

All jobs run in the process of the fixture `session`.
"""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import read_kit
from tests.helpers.job_harness import FinishedRun, JobLauncher
from tests.helpers.job_session import JobSession

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ATTACKS = "int8,ftal:epochs=1,spoil:steps=2,bn_fold,average_models,transpose_input"
#: Columns that may differ between two runs of the same attacks.
UNSTABLE_COLUMNS = {"seconds", "model", "model_digest"}
#: Two cells, λ2 = 0 and 1, of a network that trains in seconds.
TWO_CELLS = (
    *("--space", "smoke", "--width", "8", "--set", "lambda1=0.02", "--set", "phase1.epochs=1"),
    *("--set", "phase2.steps=10", "--set", "perturbation.kinds=noise,fine_tuned", "--attacks", "int8"),
    "--force",
)


def table(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open()))


def test_ray_attack_backend_gives_rows_of_one_process_and_logs_no_secret(
    jobs: JobLauncher, baseline_run: FinishedRun, session: JobSession, tmp_path: Path
) -> None:
    target = ["--model", baseline_run.result["model_path"], "--kit", baseline_run.result["kit"]]
    always = [*target, *jobs.as_owner, "--storage", str(tmp_path), "--attacks", ATTACKS]
    two_at_a_time = ["--workers", "2", "--cpus-per-worker", "1"]
    job = session.run("attack", *always, "--run", "ray", *two_at_a_time, "--json")
    result: dict[str, Any] = json.loads(job.out)
    assert job.err == "" and result["not_applicable"] == 1 and len(result["rows"]) == 7
    session.run("attack", *always, "--run", "plain", "--workers", "0", "--quiet")
    rows = [table(tmp_path / "runs" / run / "attacks.csv") for run in ("ray", "plain")]
    for ray_row, plain_row in zip(*rows, strict=True):
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


def test_ray_sweep_backend_gives_rows_of_one_process(session: JobSession, tmp_path: Path) -> None:
    always = ["--storage", str(tmp_path), *TWO_CELLS]
    job = session.run("sweep", *always, "--run", "ray", "--workers", "1", "--json")
    result: dict[str, Any] = json.loads(job.out)
    assert job.err == "" and result["ok"] == result["cells"] == 2
    session.run("sweep", *always, "--run", "plain", "--workers", "0", "--quiet")
    rows = [table(tmp_path / "runs" / run / "trials.csv") for run in ("ray", "plain")]
    for ray_row, plain_row in zip(*rows, strict=True):
        for column in set(ray_row) - {"seconds_mark", "seconds_attacks"}:
            assert ray_row[column] == plain_row[column], (ray_row["lambda2"], column)
    names = {p.name for p in (tmp_path / "runs/ray").iterdir()}
    files = "settings.json space.json result.json trials.csv trials.parquet report.html manifest.json trials"
    assert names == set(files.split()), "files of Tune and W0 must be deleted"
