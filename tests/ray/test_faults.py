"""Tests of embedding on Ray under faults: SIGKILL of workers, driver and node, Ctrl-C, job submission.

A run with a fixed key finishes with the same digest as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.job_harness import ROOT, SMALL, FinishedRun, Job, JobLauncher, checkpoints, result_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]


def _is_running(storage: Path, run: str, phase: str) -> Callable[[], bool]:
    """Return a condition: the phase has a checkpoint and has not ended."""
    end_marker = storage / "runs" / run / ("phase1.safetensors" if phase == "clean" else "result.json")
    return lambda: bool(checkpoints(storage, run, phase)) and not end_marker.exists()


@pytest.mark.slow
def test_embedding_with_killed_workers_gives_the_same_digest(
    jobs: JobLauncher, baseline_run: FinishedRun, tmp_path: Path
) -> None:
    job = jobs.embed("--run", "w", storage=tmp_path)
    for phase, which in (("clean", 0), ("mark", 1)):
        job.until(_is_running(tmp_path, "w", phase))
        before = job.workers()
        assert len(before) == 2
        os.kill(before[which], signal.SIGKILL)
        job.until(lambda gone=set(before): len(job.workers()) == 2 and not gone & set(job.workers()))
        assert not (
            tmp_path / "runs/w" / ("phase1.safetensors" if phase == "clean" else "result.json")
        ).exists()
    assert job.wait().startswith("Accepted: ") and "raylet" not in job.out + job.err
    assert result_of(tmp_path, "w")["model_digest"] == baseline_run.result["model_digest"]


@pytest.mark.slow
def test_embedding_with_killed_driver_resumes_to_the_same_digest(
    jobs: JobLauncher, baseline_run: FinishedRun, tmp_path: Path
) -> None:
    job = jobs.embed("--run", "d", storage=tmp_path)
    job.until(_is_running(tmp_path, "d", "mark"))
    job.kill()
    assert not (tmp_path / "runs/d/result.json").exists()
    resumed = jobs.resume("d", "--quiet", storage=tmp_path)
    assert resumed.wait().startswith("Accepted: ") and resumed.err == ""
    assert result_of(tmp_path, "d")["model_digest"] == baseline_run.result["model_digest"]
    names = {p.name for p in (tmp_path / "runs/d").iterdir()}
    assert names == {"settings.json", "result.json", "metrics.json", "report.html", "manifest.json"}


@pytest.mark.slow
def test_embedding_with_driver_killed_at_each_stage_gives_the_same_digest(
    jobs: JobLauncher, baseline_run: FinishedRun, tmp_path: Path
) -> None:
    run = tmp_path / "runs/e"
    job = jobs.embed("--run", "e", storage=tmp_path)
    for moment in (
        _is_running(tmp_path, "e", "clean"),  # in the middle of phase 1
        (run / "phase1.safetensors").exists,  # between the phases, before the spec is signed
        (run / "commitment.sealed").exists,  # after
        _is_running(tmp_path, "e", "mark"),
    ):
        job.until(moment)
        job.kill()
        job = jobs.resume("e", storage=tmp_path)
    job.wait()
    assert result_of(tmp_path, "e")["model_digest"] == baseline_run.result["model_digest"]


@pytest.mark.slow
def test_resume_with_fewer_workers_is_accepted(jobs: JobLauncher, tmp_path: Path) -> None:
    job = jobs.embed("--run", "n", storage=tmp_path)
    job.until(_is_running(tmp_path, "n", "mark"))
    job.kill()
    jobs.resume("n", "--workers", "1", storage=tmp_path).wait()
    result = result_of(tmp_path, "n")
    assert result["accepted"] and result["wm_accuracy"] > 0.93


@pytest.mark.slow
def test_phase_without_restarts_left_ends_with_one_error_line(jobs: JobLauncher, tmp_path: Path) -> None:
    job = jobs.embed("--run", "f", "--max-failures", "0", storage=tmp_path)
    job.until(_is_running(tmp_path, "f", "clean"))
    os.kill(job.workers()[0], signal.SIGKILL)
    assert job.wait(2) == ""
    last = job.err.splitlines()[-1]
    assert last.startswith("error: phase 'clean': It failed after 0 restarts")
    assert last.endswith(f"continue with --resume f --workers 2 --storage {tmp_path}.")


@pytest.mark.slow
def test_embedding_interrupted_by_ctrl_c_prints_one_line(jobs: JobLauncher, tmp_path: Path) -> None:
    job = jobs.embed("--run", "i", "--quiet", storage=tmp_path)
    job.until(_is_running(tmp_path, "i", "clean"))
    job.process_tree()
    job.process.send_signal(signal.SIGINT)
    assert job.wait(130) == ""
    assert job.err == "interrupted; continue with --resume NAME\n"
    job.kill()  # asserts that no process of the cluster remains


# -- clusters with several nodes -----------------------------------------------------------------


@pytest.mark.slow
def test_embedding_with_killed_node_continues_on_the_other(
    jobs: JobLauncher, head: tuple[Job, str, str], tmp_path: Path
) -> None:
    first, address, _ = head
    # One CPU of the head is occupied while the run starts, so that each node receives one worker.
    occupier = jobs.python(
        "-c",
        "import os, time, ray; ray.init(address=os.environ['RAY_ADDRESS'], log_to_driver=False); "
        "a = ray.remote(num_cpus=1)(type('Hold', (), {'up': lambda self: 1})).remote(); "
        "ray.get(a.up.remote()); "
        "print('held', flush=True); time.sleep(600)",
        RAY_ADDRESS=address,
    )
    occupier.until(lambda: "held" in occupier.out)
    second = jobs.node(f"--address={address}", "--node-ip-address=127.0.0.1", "--num-cpus=1")
    job = jobs.embed(
        "--run", "node", storage=tmp_path, RAY_ADDRESS=address, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="30"
    )
    job.until(_is_running(tmp_path, "node", "mark"))
    assert (len(first.workers()), len(second.workers())) == (1, 1)
    occupier.end()
    for pid in second.process_tree():
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    job.wait(timeout=800)
    print(f"finished {time.monotonic() - began:.0f} s after the node was killed")
    result = result_of(tmp_path, "node")
    assert result["accepted"] and result["wm_accuracy"] >= 0.95


def submission_of_the_readme() -> list[str]:
    """Return the words between `uv run ray` and `--` of the README's submission, as a user types them."""
    text = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^uv run ray (job submit .*) -- python jobs/embed\.py", text, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.slow
def test_ray_job_submit_without_owner_fails_and_with_owner_succeeds(
    jobs: JobLauncher, head: tuple[Job, str, str], tmp_path: Path
) -> None:
    _, _, dashboard = head
    submit = [dashboard if word.startswith("http://") else word for word in submission_of_the_readme()]
    run = [
        sys.executable,
        "jobs/embed.py",
        *SMALL,
        "--workers",
        "2",
        "--storage",
        str(tmp_path),
        "--run",
        "j",
    ]
    for _ in range(20):
        refused = jobs.cli(*submit, "--", *run)
        refused.wait(1)
        output = refused.out + refused.err
        if "No available agent" not in output:  # the new head node is not ready yet
            break
        time.sleep(3)
    assert "error: owner: An identity is required on a cluster" in output, output[-3000:]
    assert not list(tmp_path.iterdir())
    job = jobs.cli(*submit, "--", *run, *jobs.as_owner)
    out = job.wait(timeout=800)
    assert (
        "phase 1, task training" in out
        and "phase 2, watermark" in out
        and f"result: {tmp_path}/runs/j/result.json" in out
    )
    assert json.loads((tmp_path / "runs/j/result.json").read_text())["accepted"]
