"""Sweep backend on Ray Tune: phase 1 once for all cells that share it, then one Ray trial for each cell.

A trial is a plain function in one process (`mtlsign.experiments.sweeps.cell.run_cell`). It requests no
workers, so it cannot wait for resources that other trials hold. Ray reuses warm processes for the next cell.
Finished parts of a cell are stored in the run's folder. A trial that Tune or `--resume` starts again
continues from there.
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
from mtlsign.experiments.sweeps.backend import LogCallback, format_cell
from mtlsign.experiments.sweeps.cell import SharedCellData, run_cell, train_shared_clean_model
from mtlsign.experiments.sweeps.rows import TRIALS, Row, empty_row, load_finished_row, rows_of
from mtlsign.experiments.sweeps.run import run_sweep_job
from mtlsign.experiments.sweeps.run_folder import SweepRun
from mtlsign.experiments.sweeps.space import Cell, cells_of, count_of, has_random_values
from mtlsign.tasks import load_task

__all__ = ["RaySweepBackend", "study_on_ray", "sweep_on_ray", "trial"]

#: Metric that schedulers compare: share of matching bits, on perturbed copies if there are any.
METRIC = "bits_right"


def trial(config: dict[str, Any], *, shared: SharedCellData) -> None:
    """Run one cell as a function trainable of Ray Tune.

    Reports `bits_right` every 50 steps, and at the end the cell's complete row.

    Args:
        config: the settings of the cell that the sweep's space chose.
        shared: the data of all cells, bound with `tune.with_parameters`.
    """
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))

    def report(row: Mapping[str, Any]) -> None:
        if "seconds" in row:  # rows between two reports carry no metric
            share = row.get("snapshot_accuracy", row.get("wm_accuracy"))
            tune.report({METRIC: share, "step": row["step"]})

    cell = shared.cell(config)
    row = run_cell(cell, shared, report)
    tune.report({METRIC: row["wm_accuracy"] or 0.0, "step": _steps(cell) + 1, "row": row})


def _steps(cell: Cell) -> int:
    """Return the steps of phase 2. The row of a cell with its attacks counts as one more step."""
    return cell.settings.phase2.steps or 1


def sweep_on_ray(settings: SweepSettings, *, log: LogCallback = lambda _: None) -> dict[str, Any]:
    """Run the sweep job on Ray: join or start a cluster and run the cells there."""
    return run_sweep_job(settings, RaySweepBackend(log), log=log)


def study_on_ray(settings: ReproduceSettings, *, log: LogCallback = lambda _: None) -> dict[str, Any]:
    """Run a study of the paper with its embeddings as trials of Ray Tune."""
    return run_study(settings, make_backend=RaySweepBackend, log=log)


class RaySweepBackend:
    """Sweep backend that runs cells as trials of Ray Tune. `grid` is Tune's `ResultGrid` afterwards."""

    def __init__(self, log: LogCallback = lambda _: None) -> None:
        self._log = log
        self._resources: dict[str, float] = {}
        self._concurrent = 1
        self.grid: ResultGrid | None = None

    def preflight(self, settings: SweepSettings, space: Mapping[str, Any]) -> None:
        """Connect, compute the number of concurrent cells, and load the data on every node."""
        cluster.connect()
        self._resources = {"CPU": float(settings.cpus_per_worker)}
        if settings.gpus_per_worker:
            self._resources["GPU"] = float(settings.gpus_per_worker)
        self._concurrent = self._concurrent_cells(settings)
        first = cells_of(space, settings)[0].settings

        def load_data() -> None:
            load_task(
                first.task,
                data=first.data,
                download=first.download,
                tokenizer=first.tokenizer,
                seed=first.seed,
            )

        if cluster.is_single_machine():
            load_data()
        else:
            cluster.run_on_each_node(load_data, self._resources)

    def _concurrent_cells(self, settings: SweepSettings) -> int:
        capacity = cluster.max_placeable_workers(10**6, self._resources)
        if not capacity:
            raise ClusterError(
                f"No node has the resources of one cell ({self._resources}). The cluster has "
                f"{cluster.available_resources()}. Lower --cpus-per-worker or --gpus-per-worker.",
                field="workers",
            )
        if settings.workers is not None and settings.workers > capacity:
            raise ClusterError(
                f"{settings.workers} concurrent cells do not fit, the cluster can run {capacity}. "
                "Lower --workers.",
                field="workers",
            )
        limits = (settings.workers, settings.max_concurrent, capacity)
        concurrent = max(1, min(limit for limit in limits if limit is not None))
        self._log(
            f"{concurrent} concurrent cells, {self._resources} each; the cluster can run {capacity} of them"
        )
        return concurrent

    def run_cells(self, settings: SweepSettings, space: Mapping[str, Any], run: SweepRun) -> list[Row]:
        """Run phase 1 for each W0, then the cells; return their rows.

        Args:
            settings: the settings of the sweep.
            space: the space of Ray Tune.
            run: the folder of the run.
        """
        cells = cells_of(space, settings)
        shared = SharedCellData(
            folder=run.folder, base_weights=self._train_clean_models(cells, settings, run),
            attacks=settings.attacks, min_evidence_bits=settings.min_evidence_bits, data=settings.data,
            download=settings.download,
            tokenizer=settings.tokenizer,
        )  # fmt: skip
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # no TensorBoard files
        os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(self._concurrent))
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        random = has_random_values(space)
        logger = _CellLogger(self._log, count_of(space, settings))
        tuner = Tuner(
            tune.with_resources(tune.with_parameters(trial, shared=shared), dict(self._resources)),
            param_space=dict(space),
            tune_config=TuneConfig(
                metric=METRIC, mode="max", scheduler=_scheduler(settings, cells), reuse_actors=True,
                search_alg=_search(settings, self._concurrent),
                num_samples=settings.num_samples if random else 1,
            ),
            run_config=RunConfig(
                name=f"tune-{secrets.token_hex(4)}", storage_path=run.folder.ray_path(), verbose=0,
                failure_config=FailureConfig(max_failures=settings.max_failures),
                callbacks=[JsonLoggerCallback(), logger],  # type: ignore[no-untyped-call]
            ),
        )  # fmt: skip
        self.grid = cluster.run_in_thread(tuner.fit)
        rows = _rows(self.grid, shared)
        if random:  # an earlier start may have drawn other cells, and one cell may be drawn twice
            rows = list({row["cell"]: row for row in [*rows_of(run.folder), *rows]}.values())
        return rows

    def _train_clean_models(
        self, cells: Sequence[Cell], settings: SweepSettings, run: SweepRun
    ) -> dict[str, bytes]:
        """Train each W0 in one Ray task; a task that lost its worker continues from its checkpoint."""
        cell_of_model = {cell.clean_name: cell for cell in cells}
        task = ray.remote(
            num_cpus=self._resources["CPU"], num_gpus=self._resources.get("GPU", 0),
            max_retries=settings.max_failures,
        )(_train_clean_model)  # fmt: skip
        running = {task.remote(cell, run.folder): name for name, cell in cell_of_model.items()}
        models: dict[str, bytes] = {}
        while running:
            (call,), _ = ray.wait(list(running), num_returns=1)
            result = ray.get(call)
            if isinstance(result, MTLSignError):
                raise result
            models[running.pop(call)] = result
            self._log(f"phase 1 · {len(models)} of {len(cell_of_model)} trained")
        return models


def _train_clean_model(cell: Cell, folder: Any) -> bytes | MTLSignError:
    """Train one W0; return an invalid input as a value, because Ray would retry a task that raises."""
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    try:
        return train_shared_clean_model(cell, folder)
    except MTLSignError as error:
        return error


def _search(settings: SweepSettings, concurrent: int) -> BasicVariantGenerator:
    """Return a generator that draws by the sweep's seed, so that a resumed sweep draws the same cells."""
    return BasicVariantGenerator(max_concurrent=concurrent, random_state=settings.seed)


def _scheduler(settings: SweepSettings, cells: Sequence[Cell]) -> TrialScheduler | None:
    longest = max(_steps(cell) for cell in cells)
    if settings.scheduler == "asha":
        # ASHA stops a trial that reaches max_t. The attacks run after the last step, hence one more.
        return ASHAScheduler(time_attr="step", max_t=longest + 1, grace_period=max(1, longest // 4))
    if settings.scheduler == "median":
        return MedianStoppingRule(time_attr="step", grace_period=max(1, longest // 4))
    return None


class _CellLogger(tune.Callback):
    """Callback of Ray Tune that logs each finished cell."""

    def __init__(self, log: LogCallback, count: int) -> None:
        self._log, self._count, self._finished = log, count, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log the cell of `trial`; the parameters are those of `ray.tune.Callback`."""
        self._finished += 1
        result = trial.last_result or {}
        self._log(f"{self._finished:4}/{self._count} {format_cell(result.get('row'), trial.config)}")


def _rows(grid: ResultGrid, shared: SharedCellData) -> list[Row]:
    """Return one row for each trial: finished, stopped, or failed with Ray's reason."""
    rows: list[Row] = []
    for i in range(len(grid)):
        result = grid[i]
        metrics, config = result.metrics or {}, result.config or {}
        cell = shared.cell(config)
        row = metrics.get("row") or load_finished_row(shared.folder.child(TRIALS).child(cell.name))
        if row is None:
            failed = result.error is not None
            lines = [line for line in str(result.error).splitlines() if line.strip()] if failed else []
            reason = lines[-1][:300] if lines else f"stopped at step {metrics.get('step')}"
            row = empty_row(cell, "failed" if failed else "stopped", reason)
        rows.append(row)
    return rows
