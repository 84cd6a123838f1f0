from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from mtlsign.tasks import Batch, Split, Task
from tests.unit.attacks.helpers import TRAINING_LR, changed_parameters, cosine, run


def test_last_layer_attacks_change_last_layer_alone(module: nn.Module, tiny_task: Task) -> None:
    last, every = {"fc.weight", "fc.bias"}, {name for name, _ in module.named_parameters()}
    for name, expected in (("ftll", last), ("rtll", last), ("ftal", every), ("rtal", every)):
        done = run(f"{name}:epochs=1", module, tiny_task)
        assert changed_parameters(module, done.model) == expected, name


@dataclass(frozen=True)
class WrongLabels:
    """The same images, each with another class."""

    split: Split

    def __len__(self) -> int:
        return len(self.split)

    def to(self, device: torch.device | str) -> WrongLabels:
        return WrongLabels(self.split.to(device))

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        x, y = self.split.batch(indices, augment, part)
        return Batch(x, (y + 1) % 4)


@pytest.mark.parametrize(
    ("name", "reads_labels"),
    [("ftll", True), ("ftal", True), ("rtll", False), ("rtal", False), ("retrain", True)],
)
def test_attacks_with_new_last_layer_read_no_labels(
    name: str, reads_labels: bool, module: nn.Module, tiny_task: Task
) -> None:
    wrong = replace(tiny_task, splits={n: WrongLabels(s) for n, s in tiny_task.splits.items()})
    first, second = (run(f"{name}:epochs=1", module, task).model for task in (tiny_task, wrong))
    assert bool(changed_parameters(first, second)) == reads_labels


def test_rtll_and_rtal_reinitialise_last_layer(module: nn.Module, tiny_task: Task) -> None:
    def last(name: str, seed: int = 0) -> Tensor:
        done = run(f"{name}:epochs=1,lr=1e-6", module, tiny_task, seed)
        return done.model.fc.weight  # type: ignore[union-attr, return-value]

    original = last("ftll")
    for name in ("rtll", "rtal"):
        new = last(name)
        assert abs(cosine(new, original)) < 0.5 and abs(cosine(new, last(name, 1))) < 0.5, name
    assert cosine(last("ftal"), original) > 0.999


def test_retrain_starts_at_training_rate_and_ends_near_zero(
    module: nn.Module, tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *args: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    for text, first in (
        ("retrain", TRAINING_LR),
        ("ftal", TRAINING_LR / 4),
        ("ftal:lr=tenth", TRAINING_LR / 10),
    ):
        rates.clear()
        done = run(text, module, tiny_task)
        assert len(rates) == done.steps and rates[0] == pytest.approx(first), text
        if text == "retrain":
            assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.05 * first
        else:
            assert set(rates) == {rates[0]}
