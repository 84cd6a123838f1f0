"""Rows of an attack run: their columns, the comparison with the unattacked model, and the summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

MAX_POINTS_LOST = 5.0
"""Accuracy that a successful removal may cost, in points (rule of the Watermark Robustness Toolbox)."""

#: Columns of `attacks.csv`, in order.
COLUMNS = (
    "attack", "parameters", "seed", "kind", "status", "wm_accuracy", "evidence_bits", "accepted", "verdict",
    "primary_before", "primary_after", "points_lost", "removed", "matches", "n", "null_rate", "steps",
    "images", "seconds", "inputs", "model_digest", "model", "reason",
)  # fmt: skip
#: Arrow types of the columns. They are fixed because a column may be empty in one run.
TYPES = {
    **dict.fromkeys(COLUMNS, "string"),
    **dict.fromkeys(("seed", "matches", "n", "steps", "images"), "int64"),
    **dict.fromkeys(
        (
            "wm_accuracy",
            "evidence_bits",
            "primary_before",
            "primary_after",
            "points_lost",
            "seconds",
            "null_rate",
        ),
        "double",
    ),
    **dict.fromkeys(("accepted", "removed"), "bool"),
}
_REMOVAL_KINDS = ("removal", "function_preserving")


def compare_with_baseline(row: Row, baseline: Row | None, min_evidence_bits: float) -> Row:
    """Complete a row with the points lost and with the answer to "is the watermark removed?".

    `removed` stays None for ambiguity attacks, rows without a model, and if the unattacked model is not
    marked either. An unreadable watermark does not count as removed; its row has None, too.

    Args:
        row: the row of an attack.
        baseline: the row of the unattacked model; None if it is not measured yet.
        min_evidence_bits: evidence in bits at which a claim is accepted.

    Returns:
        A new row.
    """
    after, before = row["primary_after"], (baseline or {}).get("primary_after")
    row = row | {"primary_before": before}
    if baseline is None or before is None or after is None or not math.isfinite(after):
        return row
    row["points_lost"] = round(100 * (before - after), 4)
    readable = row["kind"] in _REMOVAL_KINDS and row["verdict"] != "not_verifiable"
    if readable and baseline["evidence_bits"] >= min_evidence_bits:
        row["removed"] = bool(
            row["evidence_bits"] < min_evidence_bits and row["points_lost"] <= MAX_POINTS_LOST
        )
    return row


def summary_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Return the number of attacks by outcome."""
    finished = [row for row in rows if row["status"] == "ok" and row["kind"] in _REMOVAL_KINDS]
    return {
        "marked": sum(
            row["kind"] == "none" and row["verdict"] in ("accepted", "needs_commitment") for row in rows
        ),
        "attacks": len([row for row in rows if row["kind"] != "none"]),
        "removed": sum(row["removed"] is True for row in finished),
        "rejected": sum(row["verdict"] in ("rejected", "unrelated") for row in finished),
        **{name: sum(row["status"] == name for row in rows)
           for name in ("diverged", "not_applicable", "failed")},
    }  # fmt: skip
