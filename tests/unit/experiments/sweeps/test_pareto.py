"""Tests of the selection of a cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.experiments.sweeps.pareto import aggregate_over_seeds, pareto_front, recommend

numbers = st.floats(-5, 5).map(lambda x: round(x, 1))
group_lists = st.lists(
    st.fixed_dictionaries(
        {
            "drop_points": numbers,
            "evidence_bits_attacked": numbers,
            "deviation_l2": numbers,
            "lambda1": numbers,
            "evidence_bits": st.sampled_from([9.0, 120.0, 700.0]),
            "n": st.integers(1, 3),
            "cells": st.just(3),
        }
    ),
    max_size=12,
)


def dominates(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    pairs = [
        (b["drop_points"], a["drop_points"]),
        (a["evidence_bits_attacked"], b["evidence_bits_attacked"]),
        (b["deviation_l2"], a["deviation_l2"]),
    ]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


@given(group_lists)
def test_pareto_front_holds_exactly_the_groups_that_none_dominates(groups: list[dict[str, float]]) -> None:
    front = pareto_front(groups)
    assert all(not any(dominates(a, b) for a in groups) for b in front)
    assert all(any(dominates(a, b) for a in groups) for b in groups if b not in front)
    assert bool(groups) == bool(front)


@given(group_lists, st.floats(0, 3))
def test_recommend_prefers_complete_groups_within_accuracy_drop(
    groups: list[dict[str, float]], max_accuracy_drop: float
) -> None:
    best, reason = recommend(groups, max_accuracy_drop, 120.0)
    accepted = [group for group in groups if group["evidence_bits"] >= 120]
    if not accepted:
        assert best is None and (not groups or "no combination reaches the required 120 bits" in reason)
        forced, reason = recommend(groups, max_accuracy_drop, 120.0, force=True)
        assert forced in groups if groups else forced is None
        assert not groups or reason.startswith("no combination reaches the required 120 bits of evidence; ")
        return
    assert best is not None and best["evidence_bits"] >= 120
    assert recommend(groups, max_accuracy_drop, 120.0, force=True) == (best, reason)
    complete = [group for group in accepted if group["n"] == 3]
    assert best["n"] == 3 or (not complete and f"only {best['n']} of its 3 cells" in reason)
    assert ("are excluded" in reason) == (0 < len(complete) < len(groups))
    within = [group for group in complete or accepted if group["drop_points"] <= max_accuracy_drop]
    if within:
        assert best["evidence_bits_attacked"] == max(group["evidence_bits_attacked"] for group in within)
    else:
        assert best["drop_points"] == min(group["drop_points"] for group in complete or accepted)


def test_aggregate_over_seeds_averages_only_finished_cells() -> None:
    def row(status: str, seed: int, bits: float | None) -> dict[str, Any]:
        return {
            "status": status, "lambda1": 0.1, "seed": seed, "drop_points": 0.0, "deviation_l2": 1.0,
            "evidence_bits_attacked": bits, "wm_accuracy": 1.0,
        }  # fmt: skip

    rows = [row("ok", 0, 100), row("ok", 1, 110), row("diverged", 2, None), row("stopped", 3, 9)]
    (mean,) = aggregate_over_seeds(rows, ["lambda1"])
    assert (mean["n"], mean["cells"]) == (2, 4) and mean["evidence_bits_attacked"] == 105
    assert mean["sd evidence_bits_attacked"] == pytest.approx(7.0710678)
