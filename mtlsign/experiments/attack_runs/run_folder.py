"""Run folder of an attack run: a row for each finished attack, the attacked models, and the results.

SECRET, because it shows what removes a watermark. Until the end it holds `settings.json`, `rows/<id>.json`
for each finished attack and a growing `attacks.csv`. Attacked models are in `models/<digest>/` of the run, in
the layout of public models. They stay out of the storage's own `models/`, because they are not for
publication.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mtlsign.config.attack import AttackSettings
from mtlsign.errors import ArtifactError, ModelError
from mtlsign.experiments.attack_runs.results import COLUMNS, TYPES, Row
from mtlsign.experiments.attack_runs.target import AttackTarget
from mtlsign.reports.tables import csv_of, parquet_of
from mtlsign.storage.model_folder import MODELS, write_model
from mtlsign.storage.run_folder import RunFolder
from mtlsign.storage.safetensors_io import parse_safetensors

ROWS, CSV = "rows", "attacks.csv"
#: Result files by the field of `result.json` that holds their location.
RESULT_FILES = {"csv": CSV, "parquet": "attacks.parquet", "report": "report.html", "result": "result.json"}
_ROW_LIMIT = 2**20


class AttackRun(RunFolder[AttackSettings]):
    """Run folder of one attack run."""

    settings_class = AttackSettings
    kind = "an attack run"

    def rows(self) -> list[Row]:
        """Return the rows of the finished attacks, without those that failed and are therefore repeated.

        Raises:
            ArtifactError: a row is damaged.
        """
        rows = []
        for name in self.folder.list(ROWS):
            try:
                row = json.loads(self.folder.read(name, _ROW_LIMIT))
                if row["status"] != "failed":
                    rows.append({column: row.get(column) for column in COLUMNS})
            except (ValueError, TypeError, KeyError):
                raise ArtifactError(
                    f"{name} of run {self.name!r} is damaged. Delete it; its attack is then repeated.",
                    field="resume",
                ) from None
        return rows

    def save_row(self, row: Row, model: bytes | None, target: AttackTarget) -> Row:
        """Store a finished row.

        Args:
            row: the row.
            model: the attacked model, if it is to be stored, too.
            target: the target of the run.

        Returns:
            The row with the location of the stored model.
        """
        if model is not None:
            try:
                row = row | {"model": self._save_model(row, model, target)}
            except ModelError as error:  # a dtype that safetensors lacks
                row = row | {"reason": str(error)}
        attack = json.dumps([row["attack"], row["setting"], row["seed"]])
        row_id = hashlib.sha256(attack.encode()).hexdigest()[:16]
        self.folder.write(f"{ROWS}/{row_id}.json", json.dumps(row).encode())
        return row

    def _save_model(self, row: Row, model: bytes, target: AttackTarget) -> str:
        attack = f"{row['attack']} {row['setting']}".strip()
        config = {
            "format": "mtlsign/model/v0", "graph": dict(target.architecture), "task": target.task,
            "name": "attacked", "attack": attack, "inputs": row["inputs"] or "",
        }  # fmt: skip
        card = f"# Attacked model\n\n`{attack}`, seed {row['seed']}: a test of a watermark, not for use.\n"
        try:
            digest = write_model(self.folder, parse_safetensors(model), config, card)
        except ArtifactError:  # two attacks gave identical weights: the folder of the first one stays
            digest = row["model_digest"]
        return self.folder.child(MODELS).child(digest).uri

    def write_table(self, rows: Sequence[Row]) -> None:
        """Write `attacks.csv` with the rows so far."""
        self.folder.write(CSV, csv_of(rows, COLUMNS))

    def finish(
        self, result: Mapping[str, Any], rows: Sequence[Row], settings: AttackSettings
    ) -> dict[str, Any]:
        """Write the results and the manifest, and delete the rows' own files.

        Args:
            result: content of `result.json`, without the run's name and the locations.
            rows: all rows.
            settings: the settings of the run.

        Returns:
            The complete content of `result.json`.
        """
        # Imported here, because matplotlib takes a second to load.
        from mtlsign.reports.attacks import render_attack_report

        locations = {field: self.location(name) for field, name in RESULT_FILES.items()}
        result = {"run": self.name, **result, **locations}
        files = {
            RESULT_FILES["csv"]: csv_of(rows, COLUMNS),
            RESULT_FILES["parquet"]: parquet_of(rows, COLUMNS, TYPES),
            RESULT_FILES["report"]: render_attack_report(result).encode(),
            RESULT_FILES["result"]: json.dumps(result, indent=1, allow_nan=False).encode(),
        }
        self.commit(files, settings)
        return result

    def delete_leftovers(self) -> None:
        """Delete the rows' own files."""
        self.folder.delete(ROWS)
