"""Search for pairs of attacks: those that single attacks let expect to leave the fewest bits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from mtlsign.attacks.expressions import AttackPlan
from mtlsign.experiments.attack_runs.results import MAX_POINTS_LOST, Row


def promising_pairs(plans: Sequence[AttackPlan], rows: Sequence[Row], count: int) -> list[AttackPlan]:
    """Return ordered pairs of single attacks, the most promising first.

    An attack that leaves m of n bits keeps the share 2m / n - 1 of the agreement beyond chance. A pair is
    expected to keep the product of both shares and to lose the sum of both losses of accuracy. Pairs that
    are expected to lose more than a successful removal may are left out, as are attacks that already remove
    the watermark, and changes that preserve the function.

    Args:
        plans: the plans of a run.
        rows: their rows, in the same order.
        count: most pairs to return.
    """
    candidates = [
        (plan, row)
        for plan, row in zip(plans, rows, strict=True)
        if plan.kind == "removal" and len(plan.steps) == 1 and row["status"] == "ok" and not row["removed"]
    ]
    pairs = []
    for (first, a), (second, b) in itertools.permutations(candidates, 2):
        loss = sum(max(0.0, float(row["points_lost"] or 0.0)) for row in (a, b))
        if first.name != second.name and loss <= MAX_POINTS_LOST:
            pairs.append((_kept_share(a) * _kept_share(b), loss, AttackPlan(first.steps + second.steps)))
    return [plan for _, _, plan in sorted(pairs, key=lambda pair: pair[:2])[:count]]


def _kept_share(row: Mapping[str, float]) -> float:
    """Return the share of the agreement beyond chance that an attack leaves, 0 to 1."""
    return max(0.0, 2 * row["wm_accuracy"] - 1)
