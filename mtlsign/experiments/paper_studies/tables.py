"""Tables of the studies: one row for each setting, with mean and standard deviation over the seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.experiments.paper_studies.definitions import DEFAULT_KINDS, PRUNING, RATIOS
from mtlsign.experiments.paper_studies.paper_values import table_3_row
from mtlsign.experiments.paper_studies.scheme_tables import mean_and_sd
from mtlsign.reports.formatting import number
from mtlsign.reports.tables import csv_of

Row = dict[str, Any]

#: Result files of a study: the table in three forms, and the record.
TABLE, TEXT, STUDY, RESULT = "study.csv", "study.md", "study.json", "result.json"
#: Accuracy of the watermark below which the paper calls it removed.
GAMMA = 0.7


def table(settings: ReproduceSettings, rows: Sequence[Row]) -> list[Row]:
    """Return the table of a study from the rows of its sweep."""
    finished = [row for row in rows if row["status"] == "ok"]
    if settings.study == "overwriting":
        task = finished[0].get("task", settings.task) if finished else settings.task
        return _overwriting_table(finished, str(task))
    return _ablation_table(finished) if settings.study == "ablation" else _attack_table(finished)


def _groups(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return groups


def _ablation_table(rows: Sequence[Row]) -> list[Row]:
    table_rows = []
    named = [row | {"head": head_name(row)} for row in rows]
    for (head, a, b), group in sorted(_groups(named, ("head", "lambda1", "lambda2")).items()):
        costs = [points_at_gamma(row) for row in group]
        # A watermark that never falls below γ counts with the cost of the last ratio, which is a lower bound.
        bounded_costs = [
            points_lost_at_ratio(row, RATIOS[-1]) if cost is None else cost
            for row, cost in zip(group, costs, strict=True)
        ]
        table_rows.append(
            {
                "head": head, "R_func": a > 0, "R_DA": b > 0, "n": len(group),
                **mean_and_sd("primary", [row["primary_marked"] for row in group]),
                **mean_and_sd("points lost until NP takes the mark below gamma", bounded_costs),
                "NP never does": costs.count(None),
                **mean_and_sd("wm accuracy after FP", [_accuracy_after_fp(row) for row in group]),
            }
        )  # fmt: skip
    return table_rows


def points_at_gamma(row: Mapping[str, Any]) -> float | None:
    """Return the cost in points of the first pruning ratio at which the watermark is below γ, or None."""
    for ratio in RATIOS:
        accuracy = _after_np(row, "wm", ratio)
        if accuracy is not None and accuracy < GAMMA:
            return points_lost_at_ratio(row, ratio)
    return None


def points_lost_at_ratio(row: Mapping[str, Any], ratio: float) -> float | None:
    """Return the cost in points of pruning at `ratio`."""
    return _after_np(row, "points lost", ratio)


def _after_np(row: Mapping[str, Any], measurement: str, ratio: float) -> float | None:
    values = [
        number(row.get(_column(row, f"{measurement} {name} ratio={ratio:g}"))) for name, _ in PRUNING.values()
    ]
    return next((value for value in values if value is not None), None)


def _accuracy_after_fp(row: Mapping[str, Any]) -> float | None:
    values = [number(row.get(_column(row, f"wm {name} ratio=0.5"))) for _, name in PRUNING.values()]
    return next((value for value in values if value is not None), None)


def _column(row: Mapping[str, Any], start: str) -> str:
    """Return the column that is `start` or continues it with further parameters."""
    return next((name for name in row if name == start or name.startswith(start + " ")), start)


def _overwriting_table(rows: Sequence[Row], task: str) -> list[Row]:
    table_rows = []
    dataset, paper_values = table_3_row(task)
    for (head,), group in sorted(
        _groups([row | {"head": head_name(row)} for row in rows], ("head",)).items()
    ):
        columns = [name for name in group[0] if name.startswith("wm overwrite ")]
        for column in columns:
            parameters = dict(word.split("=", 1) for word in column.split() if "=" in word)
            epochs = int(parameters["epochs"])
            losses = [
                100 * (row["wm_accuracy"] - row[column]) for row in group if row.get(column) is not None
            ]
            bits = [number(row.get("bits " + column.removeprefix("wm "))) for row in group]
            table_rows.append(
                {
                    "owner's head": head, "adversary's head": parameters.get("head"), "epochs": epochs,
                    "n": len(losses), **mean_and_sd("points of wm accuracy lost", losses),
                    "the paper": paper_values.get(epochs), "the paper's data": dataset,
                    **mean_and_sd("bits left", bits),
                }
            )  # fmt: skip
    return table_rows


def _attack_table(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each variant and attack: the remaining watermark and the points lost.

    Points are measured on the test split. In the rows of `none` they are the cost of the watermark itself.
    """
    table_rows = []
    variants = _groups([row | variant_of(row) for row in rows], ("head", "R_DA"))
    for (head, kinds), group in variants.items():
        attack_names = [name.removeprefix("wm ") for name in group[0] if name.startswith("wm ")]
        for name in ("none", *attack_names):
            unattacked = name == "none"
            accuracy = "wm_accuracy" if unattacked else f"wm {name}"
            bits = "evidence_bits" if unattacked else f"bits {name}"
            remaining = [row[bits] for row in group if row.get(bits) is not None]
            points = [
                100 * (row["primary_clean"] - row["primary_marked"])
                if unattacked
                else row.get(f"points lost {name}")
                for row in group
            ]
            table_rows.append(
                {
                    "head": head, "R_DA": kinds, "attack": name, "n": len(remaining),
                    **mean_and_sd("wm accuracy", [row.get(accuracy) for row in group]),
                    **mean_and_sd("bits", remaining), "fewest bits": min(remaining, default=None),
                    **mean_and_sd("points lost", points),
                }
            )  # fmt: skip
    return table_rows


def variant_of(row: Mapping[str, Any]) -> Row:
    """Return the variant of a row: its head and the perturbations in R_DA."""
    kinds = str(row.get("perturbation.kinds", DEFAULT_KINDS))
    if row["lambda2"] == 0:
        kinds = "none"
    elif kinds == "noise" and float(row.get("perturbation.noise_sigma", 1)) == 0:
        kinds = "the model itself"
    return {"head": row.get("head", "keyed"), "R_DA": kinds}


def head_name(row: Mapping[str, Any]) -> str:
    """Return the head of a row, or the name of the preset that it belongs to."""
    return "paper" if row.get("preset") == "paper" else str(row.get("head", "keyed"))


def with_all_columns(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the columns of all of them; absent values are None."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{**columns, **row} for row in rows]


def table_files(rows: Sequence[Row]) -> dict[str, bytes]:
    """Return the table of a study as CSV, Markdown and JSON."""
    return {
        TABLE: csv_of(rows, list(rows[0]) if rows else []),
        TEXT: (markdown(rows) + "\n").encode(),
        STUDY: json.dumps(list(rows), indent=1, allow_nan=False).encode(),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown, with `mean ± sd` in one column."""
    columns = [name for name in rows[0] if not name.startswith("sd ")] if rows else []
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_formatted(row, name) for name in columns) + " |")
    return "\n".join(lines)


def _formatted(row: Mapping[str, Any], name: str) -> str:
    value, sd = row.get(name), number(row.get(f"sd {name}"))
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "with" if value else "without"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if sd is None else f"{text} ± {sd:.2g}"
