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
from mtlsign.schemes.detection import DEFAULT_EVIDENCE_BITS
from mtlsign.storage.json_io import read_json_object
from mtlsign.storage.model_folder import MODELS, write_model
from mtlsign.storage.run_folder import RunFolder
from mtlsign.storage.safetensors_io import parse_safetensors

#: Unmarked network of a run with --scheme, and the checkpoint of its training.
BASE_FILE, CHECKPOINT_FILE = "base.safetensors", "base.pt"
ROWS, CSV = "rows", "attacks.csv"
#: Result files by the field of `result.json` that holds their location.
RESULT_FILES = {"csv": CSV, "parquet": "attacks.parquet", "report": "report.html", "result": "result.json"}
_ROW_LIMIT = 2**20


class AttackRun(RunFolder[AttackSettings]):
    """Run folder of one attack run."""

    settings_class = AttackSettings
    kind = "an attack run"

    def rows(self, target: AttackTarget) -> list[Row]:
        """Return the rows of the finished attacks, without those that failed and are therefore repeated.

        Args:
            target: the target of the run.

        Raises:
            ArtifactError: a row is damaged, or belongs to another target.
        """
        rows = []
        for name in self.folder.list(ROWS):
            stored = self._stored_row(name)
            if stored.get("target") != target.digest:
                raise ArtifactError(
                    f"{name} of run {self.name!r} belongs to another model, key or task. Restore the "
                    "model and the kit of the run, or start a new run.",
                    field="resume",
                )
            if stored["status"] != "failed":
                rows.append({column: stored[column] for column in COLUMNS})
        return rows

    def _stored_row(self, name: str) -> Row:
        """Return the content of a row's file. Raises `ArtifactError` if it is damaged."""
        try:
            row = read_json_object(self.folder.read(name, _ROW_LIMIT), name, limit=_ROW_LIMIT)
            complete = set(COLUMNS) <= row.keys() and name == f"{ROWS}/{_row_id(row)}.json"
        except ArtifactError:
            complete, row = False, {}
        if not complete or any(not _has_type(row[column], kind) for column, kind in TYPES.items()):
            raise ArtifactError(
                f"{name} of run {self.name!r} is damaged. Delete it; its attack is then repeated.",
                field="resume",
            )
        return row

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
        stored = row | {"target": target.digest}
        self.folder.write(f"{ROWS}/{_row_id(row)}.json", json.dumps(stored).encode())
        return row

    def _save_model(self, row: Row, model: bytes, target: AttackTarget) -> str:
        attack = f"{row['attack']} {row['parameters']}".strip()
        config = {
            "format": "mtlsign/model/v1", "architecture": dict(target.architecture), "task": target.task,
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
        for name in (BASE_FILE, CHECKPOINT_FILE):
            self.folder.delete(name)

    @classmethod
    def complete(cls, settings: AttackSettings) -> AttackSettings:
        """Let schemes with few bits be accepted: with --scheme the policy is lower unless it is given."""
        if settings.scheme is None or "min_evidence_bits" in settings.model_fields_set:
            return settings
        return settings.model_copy(update={"min_evidence_bits": DEFAULT_EVIDENCE_BITS})


def _row_id(row: Row) -> str:
    attack = json.dumps([row["attack"], row["parameters"], row["seed"]])
    return hashlib.sha256(attack.encode()).hexdigest()[:16]


def _has_type(value: object, kind: str) -> bool:
    """Return whether a value of a row fits the Arrow type of its column."""
    if kind in ("string", "bool"):
        return value is None or isinstance(value, str if kind == "string" else bool)
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
