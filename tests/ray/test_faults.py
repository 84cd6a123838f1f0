"""SIGKILL for workers, the driver, a node: the run finishes, with a fixed key with the same digest."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.job_harness import SMALL, Finished, Job, Jobs, checkpoints, result_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]


def _under_way(storage: Path, run: str, phase: str) -> Callable[[], bool]:
    """Whether the phase has a checkpoint and is not over."""
    over = storage / "runs" / run / ("clean.safetensors" if phase == "clean" else "result.json")
    return lambda: bool(checkpoints(storage, run, phase)) and not over.exists()


def test_a_killed_worker_in_either_phase_costs_time_only(
    jobs: Jobs, baseline: Finished, tmp_path: Path
) -> None:
    job = jobs.embed("--run", "w", storage=tmp_path)
    for phase, which in (("clean", 0), ("mark", 1)):
        job.until(_under_way(tmp_path, "w", phase))
        before = job.workers()
        assert len(before) == 2
        os.kill(before[which], signal.SIGKILL)
        job.until(lambda gone=set(before): len(job.workers()) == 2 and not gone & set(job.workers()))
        assert not (
            tmp_path / "runs/w" / ("clean.safetensors" if phase == "clean" else "result.json")
        ).exists()
    assert job.wait().startswith("Accepted: ") and "raylet" not in job.out + job.err
    assert result_of(tmp_path, "w")["model_digest"] == baseline.result["model_digest"]


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_resume(jobs: Jobs, baseline: Finished, tmp_path: Path) -> None:
    job = jobs.embed("--run", "d", storage=tmp_path)
    job.until(_under_way(tmp_path, "d", "mark"))
    job.kill()
    assert not (tmp_path / "runs/d/result.json").exists()
    resumed = jobs.resume("d", "--quiet", storage=tmp_path)
    assert resumed.wait().startswith("Accepted: ") and resumed.err == ""
    assert result_of(tmp_path, "d")["model_digest"] == baseline.result["model_digest"]
    names = {p.name for p in (tmp_path / "runs/d").iterdir()}
    assert names == {"settings.json", "result.json", "metrics.json", "report.html", "manifest.json"}


@pytest.mark.slow
def test_a_driver_killed_again_and_again(jobs: Jobs, baseline: Finished, tmp_path: Path) -> None:
    run = tmp_path / "runs/e"
    job = jobs.embed("--run", "e", storage=tmp_path)
    for moment in (
        _under_way(tmp_path, "e", "clean"),  # in the middle of phase 1
        (run / "clean.safetensors").exists,  # between the phases, before the spec is signed
        (run / "commitment.sealed").exists,  # after
        _under_way(tmp_path, "e", "mark"),
    ):
        job.until(moment)
        job.kill()
        job = jobs.resume("e", storage=tmp_path)
    job.wait()
    assert result_of(tmp_path, "e")["model_digest"] == baseline.result["model_digest"]


@pytest.mark.slow
def test_resume_on_another_number_of_workers(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.embed("--run", "n", storage=tmp_path)
    job.until(_under_way(tmp_path, "n", "mark"))
    job.kill()
    jobs.resume("n", "--workers", "1", storage=tmp_path).wait()
    result = result_of(tmp_path, "n")
    assert result["accepted"] and result["wm_accuracy"] > 0.93


@pytest.mark.slow
def test_a_phase_that_fails_past_its_retries_says_so_in_one_line(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.embed("--run", "f", "--max-failures", "0", storage=tmp_path)
    job.until(_under_way(tmp_path, "f", "clean"))
    os.kill(job.workers()[0], signal.SIGKILL)
    assert job.wait(2) == ""
    last = job.err.splitlines()[-1]
    assert last.startswith("error: phase 'clean': failed past its 0 retries") and last.endswith("--resume f")


@pytest.mark.slow
def test_ctrl_c_under_ray_ends_it_with_one_line(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.embed("--run", "i", "--quiet", storage=tmp_path)
    job.until(_under_way(tmp_path, "i", "clean"))
    job.family()
    job.process.send_signal(signal.SIGINT)
    assert job.wait(130) == ""
    assert job.err == "interrupted; a run goes on with --resume NAME\n"
    job.kill()  # and nothing of its cluster stays


# -- clusters of several parts ------------------------------------------------------------------


@pytest.mark.slow
def test_a_lost_node_leaves_its_worker_to_the_other(
    jobs: Jobs, head: tuple[Job, str, str], tmp_path: Path
) -> None:
    first, address, _ = head
    # While the run starts, one of the head's CPUs is taken, so that each node holds one worker.
    taker = jobs.python(
        "-c",
        "import os, time, ray; ray.init(address=os.environ['RAY_ADDRESS'], log_to_driver=False); "
        "a = ray.remote(num_cpus=1)(type('Hold', (), {'up': lambda self: 1})).remote(); "
        "ray.get(a.up.remote()); "
        "print('held', flush=True); time.sleep(600)",
        RAY_ADDRESS=address,
    )
    taker.until(lambda: "held" in taker.out)
    second = jobs.node(f"--address={address}", "--node-ip-address=127.0.0.1", "--num-cpus=1")
    job = jobs.embed(
        "--run", "node", storage=tmp_path, RAY_ADDRESS=address, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="30"
    )
    job.until(_under_way(tmp_path, "node", "mark"))
    assert (len(first.workers()), len(second.workers())) == (1, 1)
    taker.end()
    for pid in second.family():
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    job.wait(timeout=800)
    print(f"finished {time.monotonic() - began:.0f} s after the node was killed")
    result = result_of(tmp_path, "node")
    assert result["accepted"] and result["wm_accuracy"] >= 0.95


@pytest.mark.slow
def test_ray_job_submit(jobs: Jobs, head: tuple[Job, str, str], tmp_path: Path) -> None:
    _, _, dashboard = head
    submit = ["job", "submit", "--address", dashboard, "--working-dir", "."]
    submit += ["--runtime-env", "jobs/runtime_env.yaml"]
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
        said = refused.out + refused.err
        if "No available agent" not in said:  # the new head node is not ready yet
            break
        time.sleep(3)
    assert "error: owner: is required on a cluster" in said, said[-3000:]
    assert not list(tmp_path.iterdir())
    job = jobs.cli(*submit, "--", *run, *jobs.as_owner)
    out = job.wait(timeout=800)
    assert (
        "phase 1, the task" in out
        and "phase 2, the mark" in out
        and f"result: {tmp_path}/runs/j/result.json" in out
    )
    assert json.loads((tmp_path / "runs/j/result.json").read_text())["accepted"]
