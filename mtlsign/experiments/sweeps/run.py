"""Sweep: settings in, `trials.csv` and a report out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtlsign.attacks import parse_attacks
from mtlsign.config.sweep import SweepSettings
from mtlsign.experiments.sweeps.backend import LogCallback, SweepBackend
from mtlsign.experiments.sweeps.rows import Row, rows_of
from mtlsign.experiments.sweeps.run_folder import SweepRun
from mtlsign.experiments.sweeps.space import cells_of, count_of, load_space


def run_sweep_job(
    settings: SweepSettings,
    backend: SweepBackend,
    *,
    log: LogCallback = lambda _: None,
    extra_files: Callable[[Sequence[Row]], Mapping[str, bytes]] = lambda _: {},
) -> dict[str, Any]:
    """Run all cells of a space on a backend and write the results.

    Args:
        settings: the settings.
        backend: executor of the cells.
        log: called with lines for the terminal.
        extra_files: makes further result files, by name, from the rows.

    Returns:
        The content of `result.json`.

    Raises:
        MTLSignError: an input is invalid; then nothing has been written.
    """
    run, settings = SweepRun.open(settings)
    space, plans = load_space(settings), parse_attacks(settings.attacks)
    cells = cells_of(space, settings)
    backend.preflight(settings, space)
    run.reserve_name(settings)
    run.bind_space(settings.space, space)
    finished = len(rows_of(run.folder))
    log(f"run {run.name}; if it is interrupted: {settings.resume_flags(run.name)}")
    log(
        f"{count_of(space, settings)} cells of {settings.space}, "
        f"{len({cell.clean_name for cell in cells})} phase 1, {len(plans)} attacks per cell"
        + (f"; {finished} cells are finished already" if finished else "")
    )
    rows = backend.run_cells(settings, space, run)
    result = run.finish(settings, space, rows, extra_files(rows))
    if retryable_cells := result["try_again"]:
        flags = settings.resume_flags(run.name)
        log(f"{retryable_cells} of {result['cells']} cells failed; {flags} retries them")
    return result
