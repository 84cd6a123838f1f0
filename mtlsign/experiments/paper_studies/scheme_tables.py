"""Tables of the studies of several schemes: means and standard deviations over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Result = Mapping[str, Any]


def scheme_table(results: Sequence[Result]) -> list[Row]:
    """Return a row for each scheme and attack: matches, evidence in bits and points lost.

    `accepted` counts the seeds whose claim the verifier accepts. A scheme can reject a claim for another
    reason than its bits, such as the accuracy with passports.

    In the rows of `none`, points lost are those of the embedding, and epochs are its images, primary and key
    images together, as a multiple of the owner's training images.
    """
    rows: list[Row] = []
    for scheme, group in by_scheme(results).items():
        finished = [result for result in group if result["status"] == "ok"]
        if not finished:
            rows.append(_scheme_row(scheme, "none", [], reason=group[0].get("reason")))
            continue
        for attack in dict.fromkeys(_label(row) for result in finished for row in result["rows"]):
            cells = [row for result in finished for row in result["rows"] if _label(row) == attack]
            if attack == "none":
                lost = [points_of_embedding(result) for result in finished]
                epochs = [result["embedding"].get("epochs") for result in finished]
                cells = [
                    {**cell, "points_lost": points, "epochs": count}
                    for cell, points, count in zip(cells, lost, epochs, strict=True)
                ]
            rows.append(_scheme_row(scheme, attack, cells))
    return rows


def _scheme_row(scheme: str, attack: str, cells: Sequence[Result], *, reason: str | None = None) -> Row:
    measured = [cell for cell in cells if cell["status"] == "ok"]
    missing = next((cell for cell in cells if cell["status"] != "ok" or cell.get("reason")), None)
    if missing is not None:
        status = missing["status"] if missing["status"] != "ok" else missing["verdict"]
        reason = f"{status}: {missing['reason']}"
    return {
        "scheme": scheme, "attack": attack, "n": len(measured),
        **mean_and_sd("matches", (cell["matches"] for cell in measured)),
        "of": measured[0]["n"] if measured else None,
        "null rate": measured[0]["null_rate"] if measured else None,
        **mean_and_sd("bits", (cell["evidence_bits"] for cell in measured)),
        **mean_and_sd("points lost", (cell["points_lost"] for cell in measured)),
        "accepted": sum(bool(cell["accepted"]) for cell in measured),
        "epochs": next((cell["epochs"] for cell in measured if "epochs" in cell), None),
        "reason": reason,
    }  # fmt: skip


def fig6_table(results: Sequence[Result]) -> list[Row]:
    """Return a row for each scheme with the quantities of Fig. 6.

    The deviation is the relative L2 distance of the parameters from the unmarked network's. A watermark is
    invalid when the verifier rejects it. Points lost until then are the cost of the weakest measured attack
    that invalidates it; they are empty if none does.
    """
    rows: list[Row] = []
    for scheme, group in by_scheme(results).items():
        finished = [result for result in group if result["status"] == "ok"]
        accuracy_after_fp = [_first(result, "fine_prune_channels", "wm_accuracy") for result in finished]
        rows.append(
            {
                "scheme": scheme, "n": len(finished),
                **mean_and_sd("deviation", (r["embedding"]["deviation"] for r in finished)),
                **mean_and_sd("task accuracy", (r["embedding"]["primary_marked"] for r in finished)),
                **mean_and_sd("points lost by the mark", map(points_of_embedding, finished)),
                **mean_and_sd("wm accuracy after FP", accuracy_after_fp),
                **mean_and_sd("points lost until NP", (invalidated(r, "prune_channels") for r in finished)),
                **mean_and_sd("points lost until spoil", (invalidated(r, "spoil") for r in finished)),
                "reason": next((r["reason"] for r in group if r["status"] != "ok"), None),
            }
        )  # fmt: skip
    return rows


def false_claim_table(results: Sequence[Result]) -> list[Row]:
    """Return a row for each scheme with its cheapest false claim on an unmarked network."""
    rows: list[Row] = []
    for scheme, group in by_scheme(results).items():
        forgeries = [r["forgery"] for r in group if r["status"] == "ok" and r["forgery"] is not None]
        first = forgeries[0] if forgeries else {}
        rows.append(
            {
                "scheme": scheme, "method": first.get("method", "no way known"), "n": len(forgeries),
                "tries": first.get("tries"),
                **mean_and_sd("seconds", (forgery["seconds"] for forgery in forgeries)),
                **mean_and_sd("matches", (forgery["matched"] for forgery in forgeries)),
                "of": first.get("n"),
                **mean_and_sd("bits", (forgery["evidence_bits"] for forgery in forgeries)),
                "accepted": sum(bool(forgery["accepted"]) for forgery in forgeries),
                "reason": next((r["reason"] for r in group if r["status"] != "ok"), None),
            }
        )  # fmt: skip
    return rows


def points_of_embedding(result: Result) -> float:
    """Return the accuracy that the embedding costs, in points of the test split."""
    embedding = result["embedding"]
    return 100 * float(embedding["primary_clean"] - embedding["primary_marked"])


def invalidated(result: Result, attack: str) -> float | None:
    """Return the points lost by the first variant of an attack that the watermark does not survive."""
    for row in result["rows"]:
        if row["attack"] == attack and row["status"] == "ok" and not row["accepted"]:
            return float(row["points_lost"])
    return None


def _first(result: Result, attack: str, column: str) -> float | None:
    return next((row[column] for row in result["rows"] if row["attack"] == attack), None)


def _label(row: Result) -> str:
    """Return attack and parameters in one text."""
    return f"{row['attack']} {row['parameters']}".strip()


def by_scheme(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each scheme, in the order of their first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["scheme"], []).append(result)
    return groups


def mean_and_sd(name: str, values: Iterable[float | None]) -> Row:
    """Return mean and sample standard deviation of the values that are not None, in two columns."""
    numbers = [float(value) for value in values if value is not None]
    return {
        name: statistics.fmean(numbers) if numbers else None,
        f"sd {name}": statistics.stdev(numbers) if len(numbers) > 1 else None,
    }
