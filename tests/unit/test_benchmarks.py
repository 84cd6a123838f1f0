from __future__ import annotations

import json

import pytest

from benchmarks import memory, reading, run, steps, workers
from benchmarks.measure import ratio, row
from benchmarks.scene import Bare, Scene


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene.of("digits", None, 4, key_size=128, primary_batch=16, batch=16)


def test_ratios_are_medians_over_pairs_against_a_target() -> None:
    measured = ratio("x", "a / b", [(2, 4), (3, 3), (8, 1)], [(1, 1), (1, 1), (1, 1)], at_most=3)
    assert (measured.value, measured.low, measured.high, measured.wall, measured.pairs) == (3, 2, 8, 3, 3)
    assert measured.passed is True
    assert row("x", "", [19.0], at_least=20).passed is False
    assert row("x", "", [1.0]).passed is None


def test_the_real_step_and_its_parts_are_timed_in_turn(scene: Scene) -> None:
    calls: list[int] = []
    a, b = steps.clocked(scene, scene.settings, 2, lambda: calls.append(1))
    assert len(a) == len(b) == 2 and len(calls) == 2 + steps.WARM_UP
    assert all(cost[1] > 0 for cost in a)
    Bare(scene).step(2)
    assert [r.name for r in steps.step_over_parts(scene, 1)] == ["step", "step-plain"]
    assert "ESTIMATED" in steps.phase_2_over_1(scene, 1, whole=False)[0].note


def test_reading(scene: Scene) -> None:
    rows = [*reading.encoder(scene, 1), *reading.verification(scene, 1)]
    assert [r.name for r in rows] == ["qr", "qr-cold", "verify"] and all(r.value > 0 for r in rows)


def test_every_name_runs_and_prints_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [row("x", "what", [1.0], at_most=0.5)]
    for module, name in (
        (reading, "encoder"), (reading, "verification"), (steps, "step_over_parts"),
        (steps, "phase_2_over_1"), (memory, "peaks"), (workers, "two_over_one"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, **__: made)
    assert run.main(["--width", "4", "--json", "--strict"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["rows"]) == len(run.NAMES) and "torch" in printed["hardware"]
    assert "MISS" in run.line(made[0])


@pytest.mark.parametrize("flags", [["--pairs", "0"], ["--pairs", "99"], ["--only", "nothing"]])
def test_bad_flags(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        run.arguments(flags)
