"""Tests of the execution of attack plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from mtlsign.attacks import AttackPlan
from mtlsign.attacks.expressions import row_header
from mtlsign.experiments.attack_runs.executor import AttackResult, plans_with_baseline, run_all
from mtlsign.experiments.attack_runs.results import COLUMNS, summary_counts
from mtlsign.experiments.attack_runs.target import AttackTarget


def test_plans_with_baseline_puts_none_first_and_once() -> None:
    plans = plans_with_baseline("int8,none")
    assert plans[0].name == "none" and len(plans) == 2


MEASURED: dict[str, Any] = {
    "none": {"primary_after": 0.9, "evidence_bits": 500.0, "verdict": "accepted"},
    "int8": {"primary_after": 0.88, "evidence_bits": 3.0, "verdict": "rejected"},
}


class FakeBackend:
    """Backend with fixed measurements; `none` fails with seed 1."""

    def preflight(self, target: AttackTarget) -> None:
        """Check nothing."""

    def run_attacks(
        self, target: AttackTarget, plans: Sequence[AttackPlan], seed: int
    ) -> Iterator[tuple[AttackPlan, AttackResult]]:
        for plan in plans:
            failed = plan.name == "none" and seed == 1
            measured = {"status": "failed"} if failed else MEASURED[plan.name] | {"status": "ok"}
            yield plan, AttackResult(dict.fromkeys(COLUMNS) | row_header(plan) | measured, None)


def test_run_all_compares_finished_rows_with_later_baseline() -> None:
    """If `none` fails at first, the rows stored next to it have no baseline yet."""
    target: Any = SimpleNamespace(min_evidence_bits=120.0)
    plans = plans_with_baseline("int8")
    first = run_all(target, plans, 1, FakeBackend(), store_row=lambda row, _: row)
    assert first[1]["removed"] is None and summary_counts(first)["marked"] == 0
    finished = [row for row in first if row["status"] != "failed"]
    second = run_all(target, plans, 0, FakeBackend(), finished_rows=finished, store_row=lambda row, _: row)
    assert second == run_all(target, plans, 0, FakeBackend(), store_row=lambda row, _: row)
    assert (second[1]["primary_before"], second[1]["points_lost"], second[1]["removed"]) == (0.9, 2.0, True)
    assert summary_counts(second)["marked"] == summary_counts(second)["removed"] == 1
