"""mtlsign.experiments.attack_runs.results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


#: The field's success rule (Watermark-Robustness-Toolbox): mark rejected and at most so many points lost.
MAX_POINTS_LOST = 5.0


#: Columns of `attacks.csv`, in order.
COLUMNS = (
    "attack", "setting", "seed", "kind", "status", "wm_accuracy", "evidence_bits", "accepted", "verdict",
    "primary_before", "primary_after", "points_lost", "removed", "matches", "n", "steps", "images", "seconds",
    "inputs", "model_digest", "model", "reason",
)  # fmt: skip


def compare_with_baseline(row: Row, whole: Row | None, bits: float) -> Row:
    """The row beside the unattacked model's: points lost, and whether the field would call the mark removed.

    `removed` is None for forgeries, for rows without a model, where the unattacked model did not carry the
    mark either, and where the mark could not be read at all, which never counts as removed.
    """
    after, before = row["primary_after"], (whole or {}).get("primary_after")
    row = row | {"primary_before": before}
    if whole is None or before is None or after is None or not math.isfinite(after):
        return row
    row["points_lost"] = round(100 * (before - after), 4)
    readable = row["kind"] in ("removal", "free") and row["verdict"] != "not_verifiable"
    if readable and whole["evidence_bits"] >= bits:
        row["removed"] = bool(row["evidence_bits"] < bits and row["points_lost"] <= MAX_POINTS_LOST)
    return row


def summary_counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many attacks ended how."""
    ran = [row for row in rows if row["status"] == "ok" and row["kind"] in ("removal", "free")]
    return {
        "marked": sum(
            row["kind"] == "none" and row["verdict"] in ("accepted", "needs_commitment") for row in rows
        ),
        "attacks": len([row for row in rows if row["kind"] != "none"]),
        "removed": sum(row["removed"] is True for row in ran),
        "rejected": sum(row["verdict"] == "rejected" for row in ran),
        **{name: sum(row["status"] == name for row in rows)
           for name in ("diverged", "not_applicable", "failed")},
    }  # fmt: skip
