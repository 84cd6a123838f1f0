"""Sweeps over Ray Tune: phase 1 once for all cells that share it, then one trial for each cell.

A trial is a plain function in one process (`mtlsign.experiments.sweeps.trial.run_cell`), so it cannot starve on workers that it
would have to ask for itself; warm processes take cell after cell. What a cell has done lies in the run's
folder, so a trial that is started again, by Tune or by `--resume`, goes on from there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from mtlsign.distributed import cluster

# ruff: isort: split
import ray
import torch
from ray import tune
from ray.tune import FailureConfig, ResultGrid, RunConfig, TuneConfig, Tuner
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator

from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.config.sweep import SweepSettings
from mtlsign.errors import ClusterError, MTLSignError
from mtlsign.experiments.paper_studies.run import run_study
from mtlsign.experiments.sweeps.run import LogCallback, SweepRun, format_trial, run
from mtlsign.experiments.sweeps.space import Cell, cells_of, count_of, has_random_values
from mtlsign.experiments.sweeps.trial import (
    CELLS,
    Row,
    SharedTrialData,
    empty_row,
    load_finished_row,
    rows_of,
    run_cell,
    train_shared_clean_model,
)
from mtlsign.tasks import load_task

__all__ = ["RaySweepBackend", "study_on_ray", "sweep_on_ray", "trial"]

#: What schedulers compare while a cell trains: the share of bits right on perturbed copies (else plainly).
METRIC = "bits_right"


def trial(config: dict[str, Any], *, shared: SharedTrialData) -> None:
    """One cell as a Tune function trainable; give `shared` with `tune.with_parameters`.

    Reports `bits_right` every 50 steps, and at the end the cell's whole row.
    """
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))

    def show(row: Mapping[str, Any]) -> None:
        if "seconds" in row:  # a report, not a tick
            right = row.get("snapshot_accuracy", row.get("wm_accuracy"))
            tune.report({METRIC: right, "step": row["step"]})

    row = run_cell(shared.cell(config), shared, show)
    tune.report({METRIC: row["wm_accuracy"] or 0.0, "step": _steps(shared.cell(config)) + 1, "row": row})


def _steps(cell: Cell) -> int:
    """Steps of phase 2; the row of a cell, with its attacks, comes one later."""
    return cell.settings.steps or 1


def sweep_on_ray(settings: SweepSettings, *, say: LogCallback = lambda _: None) -> dict[str, Any]:
    """The sweep's job on Ray: join or start a cluster, run `sweep_run.run` there."""
    return run(settings, RaySweepBackend(say), say=say)


def study_on_ray(settings: ReproduceSettings, *, say: LogCallback = lambda _: None) -> dict[str, Any]:
    """A study of the paper with its embeddings as Tune's trials."""
    return run_study(settings, fleet=RaySweepBackend, say=say)


class RaySweepBackend:
    """Cells as Tune's trials. `grid` is Tune's `ResultGrid` afterwards."""

    def __init__(self, say: LogCallback = lambda _: None) -> None:
        self._say = say
        self._each: dict[str, float] = {}
        self._at_once = 1
        self.grid: ResultGrid | None = None

    def preflight(self, settings: SweepSettings, space: Mapping[str, Any]) -> None:
        """Connect, compute how many cells fit at a time, and look at the data on every node."""
        cluster.connect()
        self._each = {"CPU": float(settings.cpus_per_worker)}
        if settings.gpus_per_worker:
            self._each["GPU"] = float(settings.gpus_per_worker)
        fits = cluster.max_placeable_workers(10**6, self._each)
        if not fits:
            have = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}  # type: ignore[no-untyped-call]
            raise ClusterError(
                f"no node has {self._each} for one cell (the cluster: {have}); lower it", field="workers"
            )
        wanted = min(x for x in (settings.workers, settings.max_concurrent, fits) if x is not None)
        if settings.workers is not None and settings.workers > fits:
            raise ClusterError(
                f"{settings.workers} cells at a time do not fit: there is room for {fits}; lower --workers",
                field="workers",
            )
        self._at_once = max(1, wanted)
        self._say(f"{self._at_once} cells at a time, {self._each} each; the cluster has room for {fits}")
        first = cells_of(space, settings)[0].settings

        def look() -> None:
            load_task(first.task, data=first.data, download=first.download, seed=first.seed)

        if cluster.is_single_machine():
            look()
        else:
            cluster.run_on_each_node(look, self._each)

    def run_trials(self, settings: SweepSettings, space: Mapping[str, Any], run: SweepRun) -> list[Row]:
        """Phase 1 for each W0, then Tune over the cells."""
        cells = cells_of(space, settings)
        shared = SharedTrialData(
            folder=run.folder, clean=self._clean(cells, settings, run), attacks=settings.attacks, bits=settings.bits,
            data=settings.data, download=settings.download,
        )  # fmt: skip
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # TensorBoard files of every trial
        os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(self._at_once))
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        tuner = Tuner(
            tune.with_resources(tune.with_parameters(trial, shared=shared), dict(self._each)),
            param_space=dict(space),
            tune_config=TuneConfig(
                metric=METRIC, mode="max", scheduler=_scheduler(settings, cells), reuse_actors=True,
                search_alg=_search(settings, self._at_once), num_samples=settings.num_samples if has_random_values(space) else 1,
            ),
            run_config=RunConfig(
                name=f"tune-{secrets.token_hex(4)}", storage_path=run.folder.ray_path(), verbose=0,
                failure_config=FailureConfig(max_failures=settings.max_failures),
                callbacks=[JsonLoggerCallback(), _Watch(self._say, count_of(space, settings))],  # type: ignore[no-untyped-call]
            ),
        )  # fmt: skip
        self.grid = cluster.run_in_thread(tuner.fit)
        rows = _rows(self.grid, shared)
        if has_random_values(
            space
        ):  # what an earlier start drew may be other cells, and one cell may be drawn twice
            rows = list({row["cell"]: row for row in [*rows_of(run.folder), *rows]}.values())
        return rows

    def _clean(self, cells: Sequence[Cell], settings: SweepSettings, run: SweepRun) -> dict[str, bytes]:
        """W0 of every `clean_name`: one Ray task each, which go on from their checkpoints when lost."""
        firsts = {cell.clean_name: cell for cell in cells}
        gpus = self._each.get("GPU", 0)
        remote = ray.remote(num_cpus=self._each["CPU"], num_gpus=gpus, max_retries=settings.max_failures)(
            _train
        )
        left = {remote.remote(cell, run.folder): name for name, cell in firsts.items()}
        found: dict[str, bytes] = {}
        while left:
            done, _ = ray.wait(list(left), num_returns=1)
            answer = ray.get(done[0])
            if isinstance(answer, MTLSignError):
                raise answer
            found[left.pop(done[0])] = answer
            self._say(f"phase 1 · {len(found)} of {len(firsts)} trained")
        return found


def _train(cell: Cell, folder: Any) -> bytes | MTLSignError:
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    try:
        return train_shared_clean_model(cell, folder)
    except MTLSignError as error:
        return error  # trying again would not help


def _search(settings: SweepSettings, at_once: int) -> BasicVariantGenerator:
    """Grids in their order; draws by the sweep's seed, so that a resumed sweep draws the same cells."""
    return BasicVariantGenerator(max_concurrent=at_once, random_state=settings.seed)


def _scheduler(settings: SweepSettings, cells: Sequence[Cell]) -> TrialScheduler | None:
    longest = max(_steps(cell) for cell in cells)
    if (
        settings.scheduler == "asha"
    ):  # it stops whatever reaches max_t, and the attacks are still to come then
        return ASHAScheduler(time_attr="step", max_t=longest + 1, grace_period=max(1, longest // 4))
    if settings.scheduler == "median":
        return MedianStoppingRule(time_attr="step", grace_period=max(1, longest // 4))
    return None


class _Watch(tune.Callback):
    """Says each finished cell in one line."""

    def __init__(self, say: LogCallback, count: int) -> None:
        self._say, self._count, self._done = say, count, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune's hook."""
        self._done += 1
        result = trial.last_result or {}
        self._say(f"{self._done:4}/{self._count} {format_trial(result.get('row'), trial.config)}")


def _rows(grid: ResultGrid, shared: SharedTrialData) -> list[Row]:
    """A row for every trial: finished, stopped, or lost with Ray's reason."""
    rows: list[Row] = []
    for i in range(len(grid)):
        result = grid[i]
        metrics, config = result.metrics or {}, result.config or {}
        cell = shared.cell(config)
        row = metrics.get("row") or load_finished_row(shared.folder.child(CELLS).child(cell.name))
        if row is None:
            lost = result.error is not None
            lines = [line for line in str(result.error).splitlines() if line.strip()] if lost else []
            why = lines[-1][:300] if lines else f"stopped at step {metrics.get('step')}"
            row = empty_row(cell, "failed" if lost else "stopped", why)
        rows.append(row)
    return rows
