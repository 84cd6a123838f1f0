"""Tests of the sweep backend on Ray Tune: killed drivers, Ctrl-C, early stopping.

`test_equal_rows.py` compares its rows with those of one process.
"""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtlsign.config.sweep import SweepSettings
from mtlsign.experiments.sweeps.cell import SharedCellData
from mtlsign.experiments.sweeps.rows import COLUMNS
from mtlsign.experiments.sweeps.run import SweepRun
from mtlsign.experiments.sweeps.space import count_of
from mtlsign.storage.locations import open_storage
from tests.helpers.job_harness import ROOT, Job, JobLauncher

# Four starts of Ray and three waits for the end of killed workers took over eight minutes on a busy machine.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]


def start(jobs: JobLauncher, storage: Path, *flags: str) -> Job:
    """Start a sweep; the cells here are too short for an accepted watermark."""
    return jobs.python("jobs/sweep.py", "--storage", str(storage), "--force", *flags)


def table(storage: Path, run: str) -> list[dict[str, str]]:
    return list(csv.DictReader((storage / "runs" / run / "trials.csv").open()))


def done(storage: Path, run: str) -> list[Path]:
    return sorted((storage / "runs" / run / "trials").glob("*/result.json"))


def test_rows_of_stopped_and_lost_trials_contain_their_settings(tmp_path: Path) -> None:
    from mtlsign.distributed import tune

    space = {"task": "digits", "width": 8, "phase2.steps": 30, "lambda1": 0.1, "seed": 4}
    results = [
        SimpleNamespace(metrics={"step": 7}, config=space, error=None),
        SimpleNamespace(metrics=None, config={**space, "seed": 5}, error=RuntimeError("a node\nwas lost")),
    ]
    shared = SharedCellData(open_storage(str(tmp_path)), {}, "int8", 120.0, None, False)
    stopped, lost = tune._rows(results, shared)  # type: ignore[arg-type]
    assert (stopped["status"], stopped["reason"]) == ("stopped", "stopped at step 7")
    assert (lost["status"], lost["reason"]) == ("failed", "was lost")
    assert all((r["width"], r["phase2.steps"], r["lambda1"]) == (8, 30, 0.1) for r in (stopped, lost))
    assert [r["seed"] for r in (stopped, lost)] == [4, 5] and stopped["cell"] != lost["cell"]


def test_resumed_random_sweep_draws_the_same_cells_and_keeps_finished_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.tune import uniform
    from ray.tune.experiment import Experiment

    from mtlsign.distributed import tune

    class Tuner:
        """Stand-in for Ray Tune: draws the cells alike and runs none."""

        def __init__(self, _: Any, *, param_space: Any, tune_config: Any, run_config: Any) -> None:
            self._samples, self._search = tune_config.num_samples, tune_config.search_alg
            self._space = param_space

        def fit(self) -> Any:
            each = Experiment("x", print, config=self._space, num_samples=self._samples, storage_path="/tmp")
            self._search.add_configurations(each)
            configs = []
            while trial := self._search.next_trial():
                configs.append(trial.config)
                self._search.on_trial_complete(trial.trial_id)
            return [SimpleNamespace(metrics={"step": 7}, config=c, error=None) for c in configs]

    monkeypatch.setattr(tune, "Tuner", Tuner)
    monkeypatch.setattr(tune.RaySweepBackend, "_train_clean_models", lambda *_: {})

    def draw_cells(seed: int) -> dict[str, str]:
        settings = SweepSettings.of({"num_samples": 3, "seed": seed})
        space = {
            "task": "digits",
            "lambda1": uniform(0, 1),
            "lambda2": {"grid_search": [0.0, 1.0]},
            "seed": 0,
        }
        assert count_of(space, settings) == 6
        backend = tune.RaySweepBackend()
        backend._resources = {"CPU": 1.0}
        rows = backend.run_cells(settings, space, run)
        assert backend.grid is not None and len(backend.grid) == 6, "notebooks read the grid"
        return {row["cell"]: row["status"] for row in rows}

    run = SweepRun(open_storage(str(tmp_path)), "r")
    first = draw_cells(0)
    assert len(first) == 6 and draw_cells(0) == first and not set(draw_cells(1)) & set(first)
    kept = dict.fromkeys(COLUMNS, 1.0) | {
        "cell": "abc", "status": "ok", "lambda1": 0.5, "lambda2": 1.0, "seed": 0,
    }  # fmt: skip
    run.folder.write("trials/abc/result.json", json.dumps(kept).encode())
    assert draw_cells(0) == first | {"abc": "ok"}


@pytest.mark.slow
def test_ray_sweep_killed_and_interrupted_loses_no_finished_cell(jobs: JobLauncher, tmp_path: Path) -> None:
    flags = ("--space", "smoke", "--width", "8", "--num-samples", "2", "--attacks", "int8", "--workers", "2")
    job = start(jobs, tmp_path, *flags, "--run", "s")
    kept: dict[Path, bytes] = {}
    for count, stop in ((2, signal.SIGKILL), (4, signal.SIGINT), (6, signal.SIGKILL)):
        job.until(lambda count=count: len(done(tmp_path, "s")) >= count)  # type: ignore[misc]
        os.kill(job.process.pid, stop)
        job.process.wait(300)
        if stop == signal.SIGINT:
            assert job.process.returncode == 130
            assert job.err.splitlines()[-1].startswith("interrupted") and "Traceback" not in job.err
        job.kill()
        assert not (tmp_path / "runs/s/trials.csv").exists()
        kept |= {path: path.read_bytes() for path in done(tmp_path, "s")}
        job = start(jobs, tmp_path, "--resume", "s")
    job.wait()
    assert len(table(tmp_path, "s")) == 8 and len(kept) >= 6
    assert all(path.read_bytes() == data for path, data in kept.items()), "a finished cell ran again"
    assert "cells are finished already" in job.err


@pytest.mark.slow
def test_asha_stopped_cells_have_rows_with_that_status(jobs: JobLauncher, tmp_path: Path) -> None:
    flags = (
        "--width",
        "8",
        "--set",
        "phase2.steps=200",
        "--set",
        "phase1.epochs=1",
        "--num-samples",
        "2",
        "--attacks",
        "int8",
    )
    job = start(jobs, tmp_path, "--space", "smoke", *flags, "--scheduler", "asha", "--json", "--workers", "2")
    result: dict[str, Any] = json.loads(job.wait())
    assert result["ok"] + result["stopped"] == 8 and result["ok"] and result["stopped"]
    stopped = [row for row in result["rows"] if row["status"] == "stopped"]
    assert all(row["reason"].startswith("stopped at step") for row in stopped)
    assert all(row["bits int8"] is not None for row in result["rows"] if row["status"] == "ok")


@pytest.mark.slow
def test_thread_calling_ray_after_ctrl_c_starts_no_second_ray(jobs: JobLauncher, tmp_path: Path) -> None:
    """A thread of Tune may call Ray while the interrupted process ends; by default that starts a new Ray."""
    script = tmp_path / "busy.py"
    script.write_text(
        "from mtlsign.config import cli\n"
        "def main(argv):\n"
        "    from mtlsign.distributed import cluster\n"
        "    import ray\n"
        "    def ask():\n"
        "        print('up', flush=True)\n"
        "        while True:\n"
        "            try:\n"
        "                ray.put(1)\n"
        "            except Exception:\n"
        "                pass\n"
        "    cluster.connect()\n"
        "    cluster.run_in_thread(ask)\n"
        "cli.run(main)\n"
    )
    job = jobs.python(str(script), PYTHONPATH=str(ROOT))
    job.until(lambda: "up" in job.out)
    os.kill(job.process.pid, signal.SIGINT)
    assert job.wait(130) == "up\n" and job.err == "interrupted\n"
