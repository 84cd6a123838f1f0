"""Run folder of a sweep: W0, one folder for each cell, and the results.

Until the end it holds `settings.json`, `space.json` (the content of the search space), `clean/` (W0),
`trials/<id>/` (the checkpoint of a cell, later its `result.json`) and Ray Tune's own `tune-…/`. Then
`trials.csv`, `trials.parquet`, `result.json` and `report.html` are written. The manifest follows unless a
failed cell can be retried.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mtlsign.config.sweep import SweepSettings
from mtlsign.errors import ArtifactError, SettingsError
from mtlsign.experiments.origin import origin
from mtlsign.experiments.sweeps import pareto
from mtlsign.experiments.sweeps.cell import ATTACK_RESULTS_FILE, CHECKPOINT_FILE, CLEAN
from mtlsign.experiments.sweeps.rows import COLUMNS, RESULT_FILE, STATUSES, TRIALS, Row, in_order
from mtlsign.experiments.sweeps.space import VARIANT, describe
from mtlsign.reports.tables import csv_of, parquet_of
from mtlsign.storage.json_io import JSON_LIMIT, read_json_object
from mtlsign.storage.run_folder import RunFolder

SPACE_FILE = "space.json"
_OLD_TRIALS = "cells"
#: Result files by the field of `result.json` that holds their location.
RESULT_FILES = {
    "csv": "trials.csv", "parquet": "trials.parquet", "report": "report.html", "result": "result.json",
}  # fmt: skip


class SweepRun(RunFolder[SweepSettings]):
    """Run folder of one sweep."""

    settings_class = SweepSettings
    kind = "a sweep"

    def check_resumable(self) -> None:
        """Raise `ArtifactError` if the run has the layout of version 0."""
        if self.folder.list(_OLD_TRIALS):
            raise ArtifactError(
                f"Run {self.name!r} has the folder {_OLD_TRIALS!r} of version 0, which this release does not "
                "read. Start a new run.",
                field="resume",
            )

    def bind_space(self, name: str, space: Mapping[str, Any]) -> None:
        """Store the space of a run that starts; refuse a resumed run whose space has another content.

        Args:
            name: name of the space.
            space: its content.

        Raises:
            SettingsError: the space has changed.
            ArtifactError: the stored space is missing or damaged.
        """
        described = describe(space)
        if not self.folder.exists(SPACE_FILE) and not self.folder.list(TRIALS):
            self.folder.write(SPACE_FILE, json.dumps(described, indent=1).encode())
            return
        try:
            stored = read_json_object(self.folder.read(SPACE_FILE, JSON_LIMIT), SPACE_FILE)
        except ArtifactError:
            raise ArtifactError(
                f"{SPACE_FILE} of run {self.name!r} is missing or damaged. Restore it, or start a new run.",
                field="resume",
            ) from None
        missing = object()
        names = sorted({*stored, *described})
        changed = [each for each in names if stored.get(each, missing) != described.get(each, missing)]
        if changed:
            raise SettingsError(
                f"The space {name!r} has changed since run {self.name!r} started: {', '.join(changed[:5])}. "
                "Restore it, or start a new run.",
                field="space",
            )

    def finish(
        self,
        settings: SweepSettings,
        space: Mapping[str, Any],
        rows: Sequence[Row],
        extra_files: Mapping[str, bytes],
    ) -> dict[str, Any]:
        """Write the results, then the manifest.

        While a failed cell can be retried (an attack failed, or its process was lost), the results are
        written without a manifest and W0 is kept, so the run can be resumed.

        Args:
            settings: the settings of the run.
            space: the search space.
            rows: rows of all cells.
            extra_files: further result files by name.

        Returns:
            The content of `result.json`.
        """
        # Imported here, because matplotlib takes a second to load.
        from mtlsign.reports.sweeps import render_sweep_report

        rows = in_order(rows)
        retryable = [row for row in rows if row["status"] == "failed" and not self._has_result(row)]
        columns = [*COLUMNS, *sorted({name for row in rows for name in row} - set(COLUMNS))]
        result = self._result(settings, space, rows, len(retryable))
        files = {
            **extra_files,
            RESULT_FILES["csv"]: csv_of(rows, columns),
            RESULT_FILES["parquet"]: parquet_of(rows, columns),
            RESULT_FILES["report"]: render_sweep_report(result).encode(),
            RESULT_FILES["result"]: json.dumps(result, indent=1, allow_nan=False).encode(),
        }
        if retryable:
            for name, data in files.items():
                self.folder.write(name, data)
        else:
            self.commit(files, settings)
        return result

    def _result(
        self, settings: SweepSettings, space: Mapping[str, Any], rows: Sequence[Row], retryable_cells: int
    ) -> dict[str, Any]:
        varied = varied_settings(rows, space)
        counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
        groups = pareto.aggregate_over_seeds(rows, varied)
        best, reason = pareto.recommend(
            groups, settings.max_accuracy_drop, settings.min_evidence_bits, force=settings.force
        )
        return {
            "run": self.name, "space": settings.space, "attacks": settings.attacks,
            "bits_required": settings.min_evidence_bits, "max_drop": settings.max_accuracy_drop,
            "cells": len(rows), **counts, "try_again": retryable_cells, "vary": varied,
            "recommended": best, "why": reason, **origin("sweep", settings),
            "public_key": "none: the keys follow from the seeds and prove nothing",
            "front": pareto.pareto_front(groups), "groups": groups, "rows": list(rows),
            **{field: self.location(name) for field, name in RESULT_FILES.items()},
        }  # fmt: skip

    def _has_result(self, row: Row) -> bool:
        """Return True if the cell is finished, even if it failed for good."""
        return self.folder.child(TRIALS).child(row["cell"]).exists(RESULT_FILE)

    def keeps_leftovers(self, settings: SweepSettings) -> bool:
        """Return the setting `keep_checkpoints`."""
        return settings.keep_checkpoints

    def delete_leftovers(self) -> None:
        """Delete W0, the checkpoints of the cells and the folders of Ray Tune."""
        folders = {name.split("/", 1)[0] for name in self.folder.list()}
        for name in (CLEAN, *sorted(folder for folder in folders if folder.startswith("tune-"))):
            self.folder.delete(name)
        for name in self.folder.list(TRIALS):
            if name.endswith((f"/{CHECKPOINT_FILE}", f"/{ATTACK_RESULTS_FILE}")):
                self.folder.delete(name)


def varied_settings(rows: Sequence[Row], space: Mapping[str, Any]) -> list[str]:
    """Return the settings in which the cells differ, apart from the seed; λ1 and λ2 are always the first."""
    variants = space.get(VARIANT, {}).get("grid_search", ())
    listed = dict.fromkeys([*space, *(name for variant in variants for name in variant)])
    names = [name for name in listed if name not in ("lambda1", "lambda2", "seed", VARIANT)]
    varied = [name for name in names if len({json.dumps(row.get(name)) for row in rows}) > 1]
    return ["lambda1", "lambda2", *varied]
