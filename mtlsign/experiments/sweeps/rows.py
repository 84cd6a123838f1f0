"""Rows of a sweep: one for each cell, stored in the cell's own folder and collected into `trials.csv`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtlsign.attacks import AttackPlan
from mtlsign.errors import ArtifactError
from mtlsign.experiments.sweeps.space import Cell
from mtlsign.reports.formatting import number
from mtlsign.storage.base import Storage
from mtlsign.storage.json_io import read_json_object
from mtlsign.storage.locations import path_of

Row = dict[str, Any]

TRIALS, RESULT_FILE = "trials", "result.json"
STATUSES = ("ok", "diverged", "failed", "stopped")
#: Columns of `trials.csv`, before the columns of the attacks.
COLUMNS = (
    "cell", "lambda1", "lambda2", "seed", "status", "primary_clean", "primary_marked", "validation_clean",
    "validation_marked", "drop_points", "wm_accuracy", "evidence_bits", "evidence_bits_attacked",
    "deviation_l2", "wm_accuracy_on_clean", "seconds_mark", "seconds_attacks", "reason",
)  # fmt: skip
#: Columns that hold a number in the row of a cell that is "ok".
_MEASURES = ("drop_points", "wm_accuracy", "evidence_bits", "evidence_bits_attacked", "deviation_l2")
_LIMIT = 2**20


def empty_row(cell: Cell, status: str, reason: str | None = None) -> Row:
    """Return a row with the settings of a cell and without any measurement.

    Args:
        cell: the cell.
        status: one of `STATUSES`.
        reason: the reason for the status.
    """
    settings = cell.settings
    row = dict.fromkeys(COLUMNS) | {"cell": cell.name, "status": status, "reason": reason}
    row |= {name: getattr(settings, name) for name in ("lambda1", "lambda2", "seed")}
    return row | {name: value for name, value in cell.flat.items() if name not in row}


def column_label(plan: AttackPlan) -> str:
    """Return the part of a column's name that states the attack: `prune ratio=0.6 bn=kept`."""
    return f"{plan.name} {plan.parameters}".strip()


def load_finished_row(folder: Storage) -> Row | None:
    """Return the stored row of the cell whose folder is `folder`, or None if the cell is not finished.

    Raises:
        ArtifactError: the row is damaged.
    """
    if not folder.exists(RESULT_FILE):
        return None
    try:
        row = read_json_object(folder.read(RESULT_FILE, _LIMIT), RESULT_FILE)
        if not _is_complete(row) or not path_of(folder.uri).endswith(f"/{row['cell']}"):
            raise ArtifactError("The row is not that of a finished cell.")
    except ArtifactError:
        raise ArtifactError(
            f"{folder.uri}/{RESULT_FILE} is damaged. Delete it; its cell is then repeated.", field="resume"
        ) from None
    return row


def _is_complete(row: Row) -> bool:
    """Return whether a stored row has every column, with numbers where the tables need them."""
    numbers = (*("lambda1", "lambda2", "seed"), *(_MEASURES if row.get("status") == "ok" else ()))
    return (
        set(COLUMNS) <= row.keys()
        and row["status"] in STATUSES
        and isinstance(row["cell"], str)
        and all(number(row[name]) is not None for name in numbers)
    )


def rows_of(folder: Storage) -> list[Row]:
    """Return the rows of a run's finished cells, read from their own files."""
    names = [name for name in folder.list(TRIALS) if name.endswith(f"/{RESULT_FILE}")]
    rows = [load_finished_row(folder.child(name.removesuffix(f"/{RESULT_FILE}"))) for name in names]
    return in_order([row for row in rows if row is not None])


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Return the rows sorted by λ1, λ2, seed and cell."""
    return sorted(rows, key=lambda row: (row["lambda1"], row["lambda2"], row["seed"], row["cell"]))
