"""Backends of a sweep: the interface, the one of this process, and the line that both log for a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mtlsign.config.sweep import SweepSettings
from mtlsign.errors import SettingsError
from mtlsign.experiments.sweeps.cell import (
    ProgressCallback,
    SharedCellData,
    run_cell,
    train_shared_clean_model,
)
from mtlsign.experiments.sweeps.rows import Row
from mtlsign.experiments.sweeps.run_folder import SweepRun
from mtlsign.experiments.sweeps.space import cells_of, has_random_values
from mtlsign.tasks import load_task

LogCallback = Callable[[str], None]


class SweepBackend(Protocol):
    """Executor of the cells of a sweep. `mtlsign.distributed.tune` has the implementation on Ray Tune."""

    def preflight(self, settings: SweepSettings, space: Mapping[str, Any]) -> None:
        """Check the resources and the data; nothing is written yet."""

    def run_cells(self, settings: SweepSettings, space: Mapping[str, Any], run: SweepRun) -> list[Row]:
        """Run every cell; return all rows, including those of stopped and lost cells."""


class LocalSweepBackend:
    """Sweep backend of this process, without Ray: grids only, one cell after the other, all to their end."""

    def __init__(
        self, log: LogCallback = lambda _: None, on_progress: ProgressCallback | None = None
    ) -> None:
        self._log, self._on_progress = log, on_progress

    def preflight(self, settings: SweepSettings, space: Mapping[str, Any]) -> None:
        """Refuse settings that need Ray Tune, and load the data."""
        if settings.scheduler != "fifo":
            raise SettingsError(
                "A scheduler stops cells that run at the same time. Omit it with --workers 0.",
                field="scheduler",
            )
        if has_random_values(space):
            raise SettingsError(
                "The space draws random values, which needs Ray Tune. Omit --workers 0.", field="space"
            )
        first = cells_of(space, settings)[0].settings
        load_task(
            first.task, data=first.data, download=first.download, tokenizer=first.tokenizer, seed=first.seed
        )

    def run_cells(self, settings: SweepSettings, space: Mapping[str, Any], run: SweepRun) -> list[Row]:
        """Run the cells in the order of the grid."""
        cells = cells_of(space, settings)
        base_weights = {
            cell.clean_name: train_shared_clean_model(cell, run.folder, self._on_progress) for cell in cells
        }
        shared = SharedCellData(
            folder=run.folder,
            base_weights=base_weights,
            attacks=settings.attacks,
            min_evidence_bits=settings.min_evidence_bits,
            data=settings.data,
            download=settings.download,
            tokenizer=settings.tokenizer,
        )
        rows = []
        for number, cell in enumerate(cells, 1):
            rows.append(run_cell(cell, shared, self._on_progress))
            self._log(f"{number:4}/{len(cells)} {format_cell(rows[-1], cell.config)}")
        return rows


def format_cell(row: Mapping[str, Any] | None, config: Mapping[str, Any]) -> str:
    """Format the row of a cell for the log; without a row, the cell was stopped early."""
    values = config if row is None else row
    names = ", ".join(f"{name} {values[name]}" for name in ("lambda1", "lambda2") if name in values)
    if row is None:
        return f"{names} · stopped early"
    if row["status"] != "ok":
        return f"{names} · {row['status']}: {row['reason']}"
    return (
        f"{names}, seed {row['seed']} · drop {row['drop_points']:+.2f} points (validation), "
        f"{row['wm_accuracy']:.1%} of the bits, {row['evidence_bits_attacked']:.0f} bits after the attacks, "
        f"deviation {row['deviation_l2']:.2f}"
    )
