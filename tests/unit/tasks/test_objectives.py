from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtlsign.tasks import from_loaders, from_tensors
from mtlsign.tasks.objectives import target_kind

LABELS = torch.arange(40) % 4
IMAGES = torch.rand(40, 1, 4, 4)
ONE_HOT = torch.eye(4)[LABELS]
SEVERAL = torch.tensor([[1.0, 1.0, 0.0]]).expand(40, 3)


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        (LABELS, "labels"),
        (LABELS.reshape(10, 2, 2), "labels"),
        (ONE_HOT, "distributions"),
        (ONE_HOT.long(), "distributions"),
        (0.9 * ONE_HOT + 0.025, "distributions"),
        (SEVERAL, "binary"),
        (LABELS.float() % 2, "binary"),
        (torch.randn(40), "values"),
        (torch.randn(40, 1), "values"),
        ([{"boxes": LABELS}], "labels"),
    ],
)
def test_target_kind_of_targets(targets: Any, kind: str) -> None:
    assert target_kind(targets) == kind


@pytest.mark.parametrize("targets", [ONE_HOT, ONE_HOT.long()])
def test_from_tensors_with_one_hot_labels_counts_classes(targets: Tensor) -> None:
    task = from_tensors(IMAGES, targets)
    assert task.classes == 4
    batch = task.batch_at("train", 8, 0)
    logits = 50.0 * (2 * batch.targets - 1)
    metric = task.metric("cpu")
    metric.update(logits, batch.targets)
    assert float(task.loss(logits, batch.targets)) < 1e-3 and metric.value() == 1.0


@pytest.mark.parametrize(
    ("targets", "classes"), [(SEVERAL, 3), (torch.randn(40, 1), 1), (torch.randn(40), 1)]
)
def test_from_tensors_of_other_targets_has_loss_and_metric(targets: Tensor, classes: int) -> None:
    task = from_tensors(IMAGES, targets, classes=classes)
    batch = task.batch_at("train", 8, 0)
    outputs = torch.zeros(8, classes)
    metric = task.metric("cpu")
    metric.update(outputs, batch.targets)
    expected = 1 / 3 if task.targets == "binary" else -float(batch.targets.square().mean())
    assert task.loss(outputs, batch.targets) > 0
    assert metric.value() == pytest.approx(expected, abs=1e-5)


def test_loss_of_the_caller_receives_outputs_or_selected_logits() -> None:
    received: list[Any] = []

    def loss(outputs: Any, y: Tensor) -> Tensor:
        received.append(outputs)
        return torch.ones(())

    outputs = {"a": torch.ones(2, 4), "b": torch.zeros(2, 4)}
    from_tensors(IMAGES, LABELS, loss=loss).loss(outputs, LABELS[:2])
    selecting = from_tensors(IMAGES, LABELS, loss=loss, logits_of=lambda o: o["b"])
    selecting.loss(outputs, LABELS[:2])
    assert received[0] is outputs and received[1] is outputs["b"]
    assert selecting.logits_of(outputs) is outputs["b"]


@pytest.mark.parametrize(("inputs", "labels"), [("pixel_values", "labels"), ("image", "label"), ("x", "y")])
def test_from_loaders_accepts_mappings(inputs: str, labels: str) -> None:
    data = [{inputs: x, labels: y, "id": 7} for x, y in zip(IMAGES, LABELS, strict=True)]
    batches = [{inputs: IMAGES, labels: LABELS}]
    task = from_loaders({"train": tuple(batches), "test": batches})
    assert task.classes == 4 and task.input_spec.height == 4
    counted = from_loaders({"train": _Dataset(data), "test": _Dataset(data)}, count_outputs=lambda x: len(x))
    assert counted.classes == 2


class _Dataset:
    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]
