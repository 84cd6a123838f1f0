from __future__ import annotations

import torch

from mtlsign.tasks.metrics import MeanMetric
from tests.unit.tasks.synthetic import task


def test_task_defaults_are_cross_entropy_in_float32_and_accuracy() -> None:
    t = task()
    out, y = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    assert t.loss(out.bfloat16(), y).dtype == torch.float32
    metric = t.metric("cpu")
    metric.update(out, y)
    assert metric.state.tolist() == [1.0, 2.0] and metric.value() == 0.5
    assert t.to("cpu").size("train") == t.size("train")


def test_mean_metric_merges_ranks_by_sum_of_states() -> None:
    gen = torch.Generator().manual_seed(0)
    out, y = torch.rand(7, 3, generator=gen), torch.arange(7) % 3
    single = MeanMetric()
    single.update(out, y)
    ranks = [MeanMetric(), MeanMetric()]
    ranks[0].update(out[:2], y[:2])
    for start in (2, 5):
        ranks[1].update(out[start : start + 3], y[start : start + 3])
    ranks[0].state += ranks[1].state
    assert ranks[0].state.dtype == torch.float64
    assert torch.equal(ranks[0].state, single.state) and ranks[0].value() == single.value()


def test_mean_metric_without_samples_is_zero() -> None:
    assert MeanMetric().value() == 0.0
