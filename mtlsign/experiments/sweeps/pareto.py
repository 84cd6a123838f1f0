"""Selection of a cell: means over seeds, the Pareto front, one recommendation.

Only validation accuracy and the weights are used; the test split selects nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mtlsign.reports.formatting import number

#: Objectives of a cell, with True where more is better.
OBJECTIVES = {"drop_points": False, "evidence_bits_attacked": True, "deviation_l2": False}


def aggregate_over_seeds(
    rows: Sequence[Mapping[str, Any]], varied_settings: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one row for each combination of the varied settings, with means and `sd …` of the objectives.

    Column `n` counts the finished cells of a combination, `cells` all of them, including those that failed,
    diverged or were stopped. A combination without a finished cell is omitted.
    """
    combinations: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        combinations.setdefault(tuple(row.get(name) for name in varied_settings), []).append(row)
    groups = []
    for values, cells in combinations.items():
        finished = [row for row in cells if _is_finished(row)]
        if not finished:
            continue
        group: dict[str, Any] = dict(zip(varied_settings, values, strict=True))
        group |= {"n": len(finished), "cells": len(cells)}
        for name in (*OBJECTIVES, "wm_accuracy", "evidence_bits"):
            column = [x for row in finished if (x := number(row.get(name))) is not None]
            group[name] = statistics.fmean(column) if column else None
            group[f"sd {name}"] = statistics.stdev(column) if len(column) > 1 else None
        groups.append(group)
    return groups


def _is_finished(row: Mapping[str, Any]) -> bool:
    return row["status"] == "ok" and all(number(row.get(name)) is not None for name in OBJECTIVES)


def pareto_front(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the combinations that no other combination dominates, in their order."""

    def dominates(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        gains = [(a[name] - b[name]) * (1 if more else -1) for name, more in OBJECTIVES.items()]
        return bool(min(gains) >= 0 and max(gains) > 0)

    return [b for b in groups if not any(dominates(a, b) for a in groups)]


def _is_accepted(group: Mapping[str, Any], min_evidence_bits: float) -> bool:
    """Return whether the marked models of a combination reach the evidence, on average over the seeds."""
    return bool((group["evidence_bits"] or 0.0) >= min_evidence_bits)


def recommend(
    groups: Sequence[Mapping[str, Any]],
    max_accuracy_drop: float,
    min_evidence_bits: float,
    *,
    force: bool = False,
) -> tuple[Mapping[str, Any] | None, str]:
    """Recommend one combination whose marked models are accepted.

    Among those that lose at most `max_accuracy_drop` points, it has the most bits after the attacks. If there
    is none, it is the one that loses least. Combinations with unfinished cells count only if all have some.

    Args:
        groups: rows of `aggregate_over_seeds`.
        max_accuracy_drop: points of validation accuracy.
        min_evidence_bits: evidence in bits at which a claim is accepted.
        force: whether to recommend a combination although none is accepted.

    Returns:
        The combination (None if none is accepted) and the reason in words.
    """
    if not groups:
        return None, "no cell finished"
    accepted = [group for group in groups if _is_accepted(group, min_evidence_bits)]
    if not accepted and force:
        best, reason = recommend(groups, max_accuracy_drop, 0.0)
        return best, f"no combination reaches the required {min_evidence_bits:g} bits of evidence; {reason}"
    if not accepted:
        most = max(group["evidence_bits"] or 0.0 for group in groups)
        return None, (
            f"no combination reaches the required {min_evidence_bits:g} bits of evidence, even before an "
            f"attack; the most is {most:.1f}. Raise phase2.steps, phase2.lr or key_size in the space"
        )
    complete = [group for group in accepted if group["n"] == group["cells"]]
    candidates = complete or accepted
    within = [group for group in candidates if group["drop_points"] <= max_accuracy_drop]
    if within:
        best = max(within, key=lambda group: (group["evidence_bits_attacked"], -group["deviation_l2"]))
        reason = (
            f"most bits after the attacks among the {len(within)} of {len(candidates)} combinations that "
            f"lose at most {max_accuracy_drop:g} points on validation data"
        )
    else:
        best = min(candidates, key=lambda group: group["drop_points"])
        reason = f"no combination stays within {max_accuracy_drop:g} points; this one loses least"
    if not complete:
        reason += f"; only {best['n']} of its {best['cells']} cells finished"
    elif len(complete) < len(groups):
        reason += f"; {len(groups) - len(complete)} rejected or unfinished combinations are excluded"
    return best, reason
