"""Tests of the search for pairs of attacks."""

from __future__ import annotations

from typing import Any

from mtlsign.attacks import parse_attacks
from mtlsign.experiments.attack_runs.pairs import promising_pairs

TEXT = "none,noise:sigma=0.4,prune:ratio=0.5,int8,retrain,permute_channels,spoil:steps=20,prune:ratio=0.9"


def row(accuracy: float, lost: float, status: str = "ok", removed: bool = False) -> dict[str, Any]:
    return {"status": status, "wm_accuracy": accuracy, "points_lost": lost, "removed": removed}


ROWS = [
    row(1.0, 0.0), row(0.8, 1.0), row(0.9, 0.5), row(1.0, -0.2), row(0.0, 0.0, "diverged"), row(1.0, 0.0),
    row(0.5, 0.1, removed=True), row(0.6, 30.0),
]  # fmt: skip


def test_pairs_are_ordered_by_what_both_parts_leave_and_lose() -> None:
    texts = [plan.text().split("+") for plan in promising_pairs(parse_attacks(TEXT), ROWS, 100)]
    names = [tuple(part.partition(":")[0] for part in parts) for parts in texts]
    assert set(names[:2]) == {("noise", "prune"), ("prune", "noise")}
    assert set(names[2:4]) == {("noise", "int8"), ("int8", "noise")}
    assert len(names) == 6


def test_count_limits_the_pairs() -> None:
    assert len(promising_pairs(parse_attacks(TEXT), ROWS, 3)) == 3
    assert promising_pairs(parse_attacks("none"), ROWS[:1], 3) == []
