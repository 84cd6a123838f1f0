"""Tests of the parts shared by training loops."""

from __future__ import annotations

import threading

import pytest

from mtlsign.tasks import Task
from mtlsign.watermark.embedding import loop
from mtlsign.watermark.embedding.worker import SingleProcessContext
from tests.unit.watermark.embedding.phase_helpers import (
    Maker,
    ReduceBarrier,
    Settings,
    ThreadWorker,
)


def test_evaluate_divides_split_over_ranks_and_restores_modes(
    tiny_task: Task, tiny_settings: Settings, tiny_model: Maker
) -> None:
    s, model = tiny_settings(), tiny_model().train()
    model.layer2.eval()
    modes = [m.training for m in model.modules()]
    whole = loop.evaluate(model, tiny_task, "test", s, SingleProcessContext())
    assert [m.training for m in model.modules()] == modes and 0 <= whole <= 1
    meeting, found, models = ReduceBarrier(2), {}, [tiny_model(), tiny_model()]

    def shared(index: int) -> None:
        found[index] = loop.evaluate(models[index], tiny_task, "test", s, ThreadWorker(index, meeting))

    threads = [threading.Thread(target=shared, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: whole, 1: whole}


def test_one_cycle_rises_to_peak_and_falls_to_nearly_zero() -> None:
    for steps in (1, 2, 10, 600):
        rates = [loop.one_cycle(i, steps, 0.1) for i in range(steps)]
        assert all(0 < r <= 0.1 + 1e-12 for r in rates)
    assert rates[0] == pytest.approx(0.004) and max(rates) == pytest.approx(0.1) and rates[-1] < 1e-4
    assert rates.index(max(rates)) == 180
