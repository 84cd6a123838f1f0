"""Which cells of a sweep are worth having: means over seeds, the Pareto front, one recommendation.

Chosen on validation accuracy and on the weights alone; the test part chooses nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mtlsign.reports.formatting import number

#: What a cell is judged by, and whether more is better.
OBJECTIVES = {"drop_points": False, "evidence_bits_attacked": True, "deviation_l2": False}


def aggregate_over_seeds(rows: Sequence[Mapping[str, Any]], vary: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each combination of `vary`: means (and `sd …`) of the objectives over its finished cells.

    `n` are finished, of `cells`: others failed, diverged or were stopped. A combination without a finished
    one is left out.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in vary), []).append(row)
    found = []
    for values, cells in groups.items():
        group = [row for row in cells if _finished(row)]
        if not group:
            continue
        mean: dict[str, Any] = dict(zip(vary, values, strict=True)) | {"n": len(group), "cells": len(cells)}
        for name in (*OBJECTIVES, "wm_accuracy"):
            column = [x for row in group if (x := number(row.get(name))) is not None]
            mean[name] = statistics.fmean(column) if column else None
            mean[f"sd {name}"] = statistics.stdev(column) if len(column) > 1 else None
        found.append(mean)
    return found


def _finished(row: Mapping[str, Any]) -> bool:
    return row["status"] == "ok" and all(number(row.get(name)) is not None for name in OBJECTIVES)


def pareto_front(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The combinations that no other beats in one objective without losing in another, in their order."""

    def beats(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        signed = [
            (a[name] - b[name]) * (1 if more else -1) for name, more in OBJECTIVES.items()
        ]  # positive: a is better
        return bool(min(signed) >= 0 and max(signed) > 0)

    return [b for b in groups if not any(beats(a, b) for a in groups)]


def recommend(groups: Sequence[Mapping[str, Any]], max_drop: float) -> tuple[Mapping[str, Any] | None, str]:
    """The combination with the most bits left after the attacks among those that lose at most `max_drop`
    points (else the one that loses least), and why. One with unfinished cells only where all have some.
    """
    if not groups:
        return None, "no cell finished"
    whole = [g for g in groups if g["n"] == g["cells"]]
    chosen = whole or groups
    within = [g for g in chosen if g["drop_points"] <= max_drop]
    if within:
        best = max(within, key=lambda g: (g["evidence_bits_attacked"], -g["deviation_l2"]))
        why = (
            f"most bits after the attacks among the {len(within)} of {len(chosen)} combinations that lose at "
            f"most {max_drop:g} points on validation data"
        )
    else:
        best = min(chosen, key=lambda g: g["drop_points"])
        why = f"no combination stays within {max_drop:g} points; this one loses least"
    if not whole:
        why += f"; only {best['n']} of its {best['cells']} cells finished"
    elif len(whole) < len(groups):
        why += f"; {len(groups) - len(whole)} of which not every cell finished are left out"
    return best, why
