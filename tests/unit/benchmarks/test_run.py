"""Tests of the benchmarks: ratios, each measurement on a tiny network, command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import memory, run, training_step, verification, workers
from benchmarks.fixtures import BareForward, BenchmarkSetup
from benchmarks.measure import ratio, row
from benchmarks.service import ServiceFixtures, further_claim


@pytest.fixture(scope="module")
def setup() -> BenchmarkSetup:
    return BenchmarkSetup.create("digits", None, 8, key_size=128, **{"phase1.batch": 16, "phase2.batch": 16})


def test_ratio_of_pairs_is_their_median_against_a_target() -> None:
    measured = ratio("x", "a / b", [(2, 4), (3, 3), (8, 1)], [(1, 1), (1, 1), (1, 1)], at_most=3)
    assert (measured.value, measured.low, measured.high, measured.wall, measured.pairs) == (3, 2, 8, 3, 3)
    assert measured.passed is True
    assert row("x", "", [19.0], at_least=20).passed is False
    assert row("x", "", [1.0]).passed is None


def test_training_step_and_bare_passes_are_timed_in_turn(setup: BenchmarkSetup) -> None:
    calls: list[int] = []
    a, b = training_step.time_steps(setup, setup.settings, 2, lambda: calls.append(1))
    assert len(a) == len(b) == 2 and len(calls) == 2 + training_step.WARM_UP
    assert all(cost[1] > 0 for cost in a)
    BareForward(setup).run_step(2)
    assert [r.name for r in training_step.step_over_parts(setup, 1)] == ["step", "step-plain"]
    assert "ESTIMATED" in training_step.phase_2_over_1(setup, 1, estimate=True)[0].note


def test_windows_of_steps_contain_each_kind_and_inner_loop(setup: BenchmarkSetup) -> None:
    assert setup.settings.lambda2 and training_step.steps_per_window(setup.settings) == 8
    size = training_step.steps_per_window
    assert size(setup.settings.updated({"lambda2": 0.0})) == 1
    assert size(setup.settings.updated({"perturbation.kinds": ("noise", "pruned", "noise")})) == 3
    spread = {"perturbation.kinds": ("fine_tuned",), "perturbation.refresh_steps": 24}
    assert size(setup.settings.updated(spread)) == 24
    calls: list[int] = []
    a, b = training_step.time_windows(setup, setup.settings, 2, lambda: calls.append(1))
    assert len(a) == len(b) == 2 and len(calls) == 2 * (8 + training_step.WARM_UP)


def test_verification_rows_have_names_and_positive_values(setup: BenchmarkSetup) -> None:
    rows = [*verification.encoder(setup, 1), *verification.verification(setup, 1)]
    assert [r.name for r in rows] == ["qr", "qr-cold", "verify"] and all(r.value > 0 for r in rows)


def test_main_with_json_prints_a_row_of_each_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("x", "title", [1.0], at_most=0.5)]
    for module, name in (
        (verification, "encoder"), (verification, "verification"), (training_step, "step_over_parts"),
        (training_step, "phase_2_over_1"), (memory, "peaks"), (workers, "two_over_one"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, **__: rows)
    assert run.main(["--width", "4", "--json", "--strict"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["rows"]) == len(run.NAMES) and "torch" in printed["hardware"]
    assert "MISS" in run.line(rows[0])


@pytest.mark.parametrize("flags", [["--pairs", "0"], ["--pairs", "99"], ["--only", "nothing"]])
def test_arguments_outside_their_limits_exit(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        run.arguments(flags)


def test_service_fixtures_hold_a_marked_network_and_a_further_claim_is_measured(tmp_path: Path) -> None:
    marked = ServiceFixtures.make(width=8, n=128, side=21, keys=1, steps=1)
    assert json.loads(marked.right.spec)["head"]["kind"] == "keyed" and marked.tensors
    unmarked = ServiceFixtures.make(width=8, n=128, side=21, keys=3, steps=0)
    measured = further_claim(unmarked, tmp_path, repeats=1)
    assert measured["pairs"] == 1 and measured["further_over_forward"] > 0
