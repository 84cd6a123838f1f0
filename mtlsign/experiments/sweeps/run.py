"""The folder of a sweep, and the sweep itself: settings in, `cells.csv` and a report out.

`runs/<name>/` is SECRET. While the sweep goes on it holds `settings.json`, `clean/` (W0), `cells/<id>/` (each
cell's checkpoint, then its `result.json`) and Ray Tune's own `tune-…/`; at the end `cells/*/result.json`,
`cells.csv`, `cells.parquet`, `result.json`, `report.html` and, unless a failed cell may be tried again, the
manifest.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mtlsign.attacks import parse_attacks
from mtlsign.config.base import dump
from mtlsign.config.sweep import CHANGEABLE, SweepSettings
from mtlsign.errors import ArtifactError, SettingsError
from mtlsign.experiments.sweeps import pareto
from mtlsign.experiments.sweeps.space import VARIANT, cells_of, count_of, has_random_values, load_space
from mtlsign.experiments.sweeps.trial import (
    ATTACK_RESULTS_FILE,
    CELLS,
    CLEAN,
    COLUMNS,
    RESULT,
    STATE,
    Row,
    SharedTrialData,
    Show,
    in_order,
    rows_of,
    run_cell,
    train_shared_clean_model,
)
from mtlsign.reports.tables import csv_of, parquet_of
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import MANIFEST, write_manifest_folder
from mtlsign.storage.model_folder import RUNS
from mtlsign.tasks import load_task

SETTINGS = "settings.json"
_LIMIT = 2**20

LogCallback = Callable[[str], None]


class SweepBackend(Protocol):
    """Where a sweep runs."""

    def preflight(self, settings: SweepSettings, space: Mapping[str, Any]) -> None:
        """See that there is room and that the data are there; nothing is written yet."""

    def run_trials(self, settings: SweepSettings, space: Mapping[str, Any], run: SweepRun) -> list[Row]:
        """Run every cell; rows of what was stopped or lost included."""


class LocalSweepBackend:
    """One cell after the other in this process, without Ray: grids only, every cell to its end."""

    def __init__(self, say: LogCallback = lambda _: None, show: Show | None = None) -> None:
        self._say, self._show = say, show

    def preflight(self, settings: SweepSettings, space: Mapping[str, Any]) -> None:
        """Load the data here."""
        if settings.scheduler != "fifo":
            raise SettingsError(
                "stops cells that run side by side; leave it out with --workers 0", field="scheduler"
            )
        if has_random_values(space):
            raise SettingsError("draws values, which needs Ray Tune; leave out --workers 0", field="space")
        first = cells_of(space, settings)[0].settings
        load_task(first.task, data=first.data, download=first.download, seed=first.seed)

    def run_trials(self, settings: SweepSettings, space: Mapping[str, Any], run: SweepRun) -> list[Row]:
        """In the order of the grid."""
        cells = cells_of(space, settings)
        clean = {cell.clean_name: train_shared_clean_model(cell, run.folder, self._show) for cell in cells}
        shared = SharedTrialData(
            run.folder, clean, settings.attacks, settings.bits, settings.data, settings.download
        )
        rows = []
        for number, cell in enumerate(cells, 1):
            rows.append(run_cell(cell, shared, self._show))
            self._say(f"{number:4}/{len(cells)} {format_trial(rows[-1], cell.config)}")
        return rows


def format_trial(row: Mapping[str, Any] | None, config: Mapping[str, Any]) -> str:
    """A cell in one line."""
    values = config if row is None else row
    names = ", ".join(f"{name} {values[name]}" for name in ("lambda1", "lambda2") if name in values)
    if row is None:
        return f"{names} · stopped early"
    if row["status"] != "ok":
        return f"{names} · {row['status']}: {row['reason']}"
    return (
        f"{names}, seed {row['seed']} · drop {row['drop_points']:+.2f} points (validation), "
        f"{row['wm_accuracy']:.1%} of the bits, {row['evidence_bits_attacked']:.0f} bits after the attacks, "
        f"moved {row['deviation_l2']:.2f}"
    )


def run(
    settings: SweepSettings, backend: SweepBackend, *, say: LogCallback = lambda _: None,
    more: Callable[[Sequence[Row]], Mapping[str, bytes]] = lambda _: {},
) -> dict[str, Any]:  # fmt: skip
    """Sweep a space and write the run; returns `result.json`. `more` makes further files from the rows.

    Raises:
        MTLSignError: bad input; then nothing has been written.
    """
    kept, settings = SweepRun.open(settings)
    space, orders = load_space(settings), parse_attacks(settings.attacks)
    cells = cells_of(space, settings)
    backend.preflight(settings, space)
    kept.begin(settings)
    have = len(rows_of(kept.folder))
    say(f"run {kept.name}: if it is interrupted: --resume {kept.name}")
    say(
        f"{count_of(space, settings)} cells of {settings.space}, {len({c.clean_name for c in cells})} phase 1, "
        f"{len(orders)} attacks a cell" + (f"; {have} cells are done already" if have else "")
    )
    rows = backend.run_trials(settings, space, kept)
    whole = kept.finish(settings, space, rows, more(rows))
    if left := whole["try_again"]:
        say(f"{left} of {whole['cells']} cells failed; --resume {kept.name} tries again what failed")
    return whole


class SweepRun:
    """One sweep's folder, new or resumed.

    Raises (from `open` and `begin`): SettingsError when the name is taken or unknown, or `--resume` changes
    what is computed; StorageError when the place cannot be written.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        self.folder = storage.child(RUNS).child(name)

    @classmethod
    def open(cls, settings: SweepSettings) -> tuple[SweepRun, SweepSettings]:
        """Find the run that the settings ask for; nothing is kept there before `begin`."""
        storage = open_storage(settings.storage, endpoint=settings.endpoint)
        if settings.resume is not None:
            found = cls(storage, settings.resume)
            return found, found._resumed(settings)
        storage.check_writable()  # leaves nothing behind
        unique = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
        made = cls(storage, settings.run or unique)
        if made.folder.exists(SETTINGS):
            raise made._taken()
        return made, settings

    def begin(self, settings: SweepSettings) -> None:
        """Take the name by keeping the settings there, unless resumed. Raises `SettingsError` if taken."""
        if settings.resume is None and not self.folder.write(SETTINGS, dump(settings), if_absent=True):
            raise self._taken()

    def _taken(self) -> SettingsError:
        return SettingsError(
            f"{self.name!r} exists; choose another name, or go on with --resume {self.name}", field="run"
        )

    def _resumed(self, settings: SweepSettings) -> SweepSettings:
        if not self.folder.exists(SETTINGS):
            raise SettingsError(
                f"no run {self.name!r} in {self.storage.uri}; check --storage and the name", field="resume"
            )
        if self.folder.exists(MANIFEST):
            raise SettingsError(
                f"run {self.name!r} is finished; its result lies in {self.folder.uri}", field="resume"
            )
        try:
            kept = SweepSettings.of(json.loads(self.folder.read(SETTINGS, _LIMIT)))
        except (ValueError, TypeError, SettingsError):
            raise ArtifactError(
                f"{SETTINGS} of run {self.name!r} is no sweep's; give the name of one", field="resume"
            ) from None
        for field in sorted(settings.model_fields_set - CHANGEABLE):
            if getattr(settings, field) != getattr(kept, field):
                raise SettingsError(
                    f"is {getattr(kept, field)} in run {self.name!r}; leave it out, or start a new run",
                    field=field.replace("_", "-"),
                )
        return kept.model_copy(
            update={f: getattr(settings, f) for f in settings.model_fields_set & CHANGEABLE}
        )

    def finish(
        self,
        settings: SweepSettings,
        space: Mapping[str, Any],
        rows: Sequence[Row],
        more: Mapping[str, bytes],
    ) -> dict[str, Any]:
        """Write what remains, the manifest last; returns the result with its places.

        While a cell has failed and may be tried again (an attack of it failed, its process was lost), the
        tables and the report are written too, but the run stays open: no manifest, and W0 is kept.
        """
        # Loaded here: matplotlib takes a second, and on a new machine says that it builds its font cache.
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        from mtlsign.reports.sweeps import render_sweep_report

        rows = in_order(rows)
        columns = [*COLUMNS, *sorted({name for row in rows for name in row} - set(COLUMNS))]
        vary = varied_settings(rows, space)
        groups = pareto.aggregate_over_seeds(rows, vary)
        best, why = pareto.recommend(groups, settings.max_drop)
        counted = {state: sum(row["status"] == state for row in rows) for state in _STATES}
        again = [row for row in rows if row["status"] == "failed" and not self._kept(row)]
        names = {
            "csv": "cells.csv", "parquet": "cells.parquet", "report": "report.html", "result": "result.json",
        }  # fmt: skip
        whole: dict[str, Any] = {
            "run": self.name, "space": settings.space, "attacks": settings.attacks, "bits_required": settings.bits,
            "max_drop": settings.max_drop, "cells": len(rows), **counted, "try_again": len(again), "vary": vary,
            "recommended": best, "why": why, "front": pareto.pareto_front(groups), "groups": groups, "rows": rows,
            **{key: self.folder.child(name).uri for key, name in names.items()},
        }  # fmt: skip
        files = {
            **more,
            names["csv"]: csv_of(rows, columns),
            names["parquet"]: parquet_of(rows, columns),
            names["report"]: render_sweep_report(whole).encode(),
            names["result"]: json.dumps(whole, indent=1, allow_nan=False).encode(),
        }
        if again:
            for name, data in files.items():
                self.folder.write(name, data)
            return whole
        write_manifest_folder(self.folder, files)
        if not settings.keep_checkpoints:
            self._clear()
        return whole

    def _kept(self, row: Row) -> bool:
        """Whether this cell is finished, also where it failed for good."""
        return self.folder.child(CELLS).child(row["cell"]).exists(RESULT)

    def _clear(self) -> None:
        """Delete what only an unfinished sweep needs: W0 above all."""
        tops = {name.split("/", 1)[0] for name in self.folder.list()}
        for name in (CLEAN, *sorted(t for t in tops if t.startswith("tune-"))):
            self.folder.delete(name)
        for name in self.folder.list("cells"):
            if name.endswith((f"/{STATE}", f"/{ATTACK_RESULTS_FILE}")):
                self.folder.delete(name)


_STATES = ("ok", "diverged", "failed", "stopped")


def varied_settings(rows: Sequence[Row], space: Mapping[str, Any]) -> list[str]:
    """Settings in which the cells differ, the seed apart: λ1 and λ2 first, and always."""
    arms = space.get(VARIANT, {}).get("grid_search", ())
    known = dict.fromkeys([*space, *(name for arm in arms for name in arm)])
    names = [name for name in known if name not in ("lambda1", "lambda2", "seed", VARIANT)]
    differ = [name for name in names if len({json.dumps(row.get(name)) for row in rows}) > 1]
    return ["lambda1", "lambda2", *differ]
