"""Tests of the attack backend on Ray: Ctrl-C and resume. `test_equal_rows.py` compares its rows."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import pytest

from tests.helpers.job_harness import FinishedRun, Job, JobLauncher

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]


def start(jobs: JobLauncher, baseline_run: FinishedRun, storage: Path, *flags: str) -> Job:
    always = ["--model", baseline_run.result["model_path"], "--kit", baseline_run.result["kit"]]
    return jobs.python("jobs/attack.py", *always, *jobs.as_owner, "--storage", str(storage), *flags)


def table(storage: Path, run: str) -> list[dict[str, str]]:
    return list(csv.DictReader((storage / "runs" / run / "attacks.csv").open()))


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
