"""A sweep over Ray Tune: rows as in one process; killed drivers and Ctrl-C lose no finished cell."""

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
from mtlsign.experiments.sweeps.run import SweepRun
from mtlsign.experiments.sweeps.space import count_of
from mtlsign.experiments.sweeps.trial import SharedTrialData
from mtlsign.storage.locations import open_storage
from tests.helpers.job_harness import ROOT, Job, Jobs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

#: Two cells, λ2 = 0 and 1, of a network that trains in seconds.
TWO = ("--space", "smoke", "--width", "8", "--fixed", "lambda1=0.02,epochs=1", "--attacks", "int8")


def start(jobs: Jobs, storage: Path, *flags: str) -> Job:
    return jobs.python("jobs/sweep.py", "--storage", str(storage), *flags)


def table(storage: Path, run: str) -> list[dict[str, str]]:
    return list(csv.DictReader((storage / "runs" / run / "cells.csv").open()))


def done(storage: Path, run: str) -> list[Path]:
    return sorted((storage / "runs" / run / "cells").glob("*/result.json"))


def test_trials_give_the_rows_of_one_process(jobs: Jobs, tmp_path: Path) -> None:
    job = start(jobs, tmp_path, *TWO, "--run", "ray", "--workers", "2", "--json")
    result: dict[str, Any] = json.loads(job.wait())
    assert job.err == "" and result["ok"] == result["cells"] == 2
    start(jobs, tmp_path, *TWO, "--run", "plain", "--workers", "0", "--quiet").wait()
    for ray_row, plain_row in zip(table(tmp_path, "ray"), table(tmp_path, "plain"), strict=True):
        for column in set(ray_row) - {"seconds_mark", "seconds_attacks"}:
            assert ray_row[column] == plain_row[column], (ray_row["lambda2"], column)
    names = {p.name for p in (tmp_path / "runs/ray").iterdir()}
    files = "settings.json result.json cells.csv cells.parquet report.html manifest.json cells"
    assert names == set(files.split()), "Tune's own files and W0 have to go"


def test_rows_of_what_was_stopped_or_lost_hold_their_settings(tmp_path: Path) -> None:
    from mtlsign.distributed import tune

    space = {"task": "digits", "width": 8, "steps": 30, "lambda1": 0.1, "seed": 4}
    results = [
        SimpleNamespace(metrics={"step": 7}, config=space, error=None),
        SimpleNamespace(metrics=None, config={**space, "seed": 5}, error=RuntimeError("a node\ndied")),
    ]
    shared = SharedTrialData(open_storage(str(tmp_path)), {}, "int8", 120.0, None, False)
    stopped, lost = tune._rows(results, shared)  # type: ignore[arg-type]
    assert (stopped["status"], stopped["reason"]) == ("stopped", "stopped at step 7")
    assert (lost["status"], lost["reason"]) == ("failed", "died")
    assert all((r["width"], r["steps"], r["lambda1"]) == (8, 30, 0.1) for r in (stopped, lost))
    assert [r["seed"] for r in (stopped, lost)] == [4, 5] and stopped["cell"] != lost["cell"]


def test_a_resumed_sweep_draws_the_same_cells_and_keeps_what_else_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.tune import uniform
    from ray.tune.experiment import Experiment

    from mtlsign.distributed import tune

    class Tuner:
        """Draws the cells as Ray Tune does, and runs none of them."""

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
    monkeypatch.setattr(tune.RaySweepBackend, "_clean", lambda *_: {})

    def drawn(seed: int) -> dict[str, str]:
        settings = SweepSettings.of({"num_samples": 3, "seed": seed})
        space = {
            "task": "digits",
            "lambda1": uniform(0, 1),
            "lambda2": {"grid_search": [0.0, 1.0]},
            "seed": 0,
        }
        assert count_of(space, settings) == 6
        fleet = tune.RaySweepBackend()
        fleet._each = {"CPU": 1.0}
        rows = fleet.run_trials(settings, space, run)
        assert fleet.grid is not None and len(fleet.grid) == 6, "what a notebook looks at afterwards"
        return {row["cell"]: row["status"] for row in rows}

    run = SweepRun(open_storage(str(tmp_path)), "r")
    first = drawn(0)
    assert len(first) == 6 and drawn(0) == first and not set(drawn(1)) & set(first)
    kept = {"cell": "abc", "status": "ok", "lambda1": 0.5, "lambda2": 1.0, "seed": 0}
    run.folder.write("cells/abc/result.json", json.dumps(kept).encode())
    assert drawn(0) == first | {"abc": "ok"}


@pytest.mark.slow
def test_killed_twice_and_interrupted_once_it_loses_no_finished_cell(jobs: Jobs, tmp_path: Path) -> None:
    flags = ("--space", "smoke", "--width", "8", "--num-samples", "2", "--attacks", "int8", "--workers", "2")
    job = start(jobs, tmp_path, *flags, "--run", "s")
    kept: dict[Path, bytes] = {}
    for count, stop in ((2, signal.SIGKILL), (4, signal.SIGINT), (6, signal.SIGKILL)):
        job.until(lambda count=count: len(done(tmp_path, "s")) >= count)  # type: ignore[misc]
        os.kill(job.process.pid, stop)
        job.process.wait(120)
        if stop == signal.SIGINT:
            assert job.process.returncode == 130
            assert job.err.splitlines()[-1].startswith("interrupted") and "Traceback" not in job.err
        job.kill()
        assert not (tmp_path / "runs/s/cells.csv").exists()
        kept |= {path: path.read_bytes() for path in done(tmp_path, "s")}
        job = start(jobs, tmp_path, "--resume", "s")
    job.wait()
    assert len(table(tmp_path, "s")) == 8 and len(kept) >= 6
    assert all(path.read_bytes() == data for path, data in kept.items()), "a finished cell ran again"
    assert "cells are done already" in job.err


@pytest.mark.slow
def test_asha_stops_cells_and_their_rows_say_so(jobs: Jobs, tmp_path: Path) -> None:
    flags = ("--width", "8", "--fixed", "steps=200,epochs=1", "--num-samples", "2", "--attacks", "int8")
    job = start(jobs, tmp_path, "--space", "smoke", *flags, "--scheduler", "asha", "--json", "--workers", "2")
    result: dict[str, Any] = json.loads(job.wait())
    assert result["ok"] + result["stopped"] == 8 and result["ok"] and result["stopped"]
    stopped = [row for row in result["rows"] if row["status"] == "stopped"]
    assert all(row["reason"].startswith("stopped at step") for row in stopped)
    assert all(row["bits int8"] is not None for row in result["rows"] if row["status"] == "ok")


@pytest.mark.slow
def test_what_still_runs_after_ctrl_c_starts_no_second_ray(jobs: Jobs, tmp_path: Path) -> None:
    """Tune's thread may call Ray while the interrupted process ends it: by default that starts another."""
    script = tmp_path / "busy.py"
    script.write_text(
        "from mtlsign import cli\n"
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
        "    cluster.beside(ask)\n"
        "cli.run(main)\n"
    )
    job = jobs.python(str(script), PYTHONPATH=str(ROOT))
    job.until(lambda: "up" in job.out)
    os.kill(job.process.pid, signal.SIGINT)
    assert job.wait(130) == "up\n" and job.err == "interrupted\n"
