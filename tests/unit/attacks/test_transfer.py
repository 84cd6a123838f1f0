"""Transfer learning to half of the classes and to another task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.fine_tuning import last_layer
from mtlsign.models.input_spec import ImageSpec
from mtlsign.schemes import make_scheme
from mtlsign.tasks import Task, from_tensors
from tests.unit.attacks.helpers import Maker, changed_parameters, run


def other_task(side: int = 24, channels: int = 1) -> Task:
    """Three classes of images."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(60) % 3
    x = torch.rand(3, channels, side, side, generator=generator)[y]
    return from_tensors(x + 0.1 * torch.randn(x.shape, generator=generator), y, name="other")


def test_transfer_to_half_of_classes_trains_new_outputs(tiny_task: Task, tiny_model: Maker) -> None:
    model = tiny_model()
    outcome = run("transfer:epochs=2,batch=16", model, tiny_task, seed=1)
    assert last_layer(outcome.model).out_features == 2 and last_layer(model).out_features == 4
    assert outcome.task is not None and outcome.task.classes == 2
    assert outcome.steps > 0 and "conv1.weight" in changed_parameters(model, outcome.model)
    test = outcome.task.splits["test"]
    labels = test.batch(torch.arange(len(test))).targets
    assert set(labels.tolist()) == {0, 1} and len(test) == tiny_task.size("test") // 2
    seen = outcome.task.size("attacker")
    assert 0 < seen < tiny_task.size("attacker"), "the attacker reads no other data"


def test_transfer_to_other_task_scales_images_and_reads_all_its_data(
    tiny_task: Task, tiny_model: Maker
) -> None:
    model, other = tiny_model(), other_task(side=16)
    outcome = run("transfer:to=task,layers=last,epochs=1", model, tiny_task, transfer_task=other)
    assert outcome.task is not None and outcome.task.input_spec == ImageSpec(1, 24, 24, 3)
    assert outcome.task.size("attacker") == other.size("train")
    assert outcome.task.splits["test"].batch(torch.arange(2)).inputs.shape == (2, 1, 24, 24)
    assert outcome.model(outcome.task.input_spec.sample()).shape == (2, 3)
    assert {n for n in changed_parameters(model, outcome.model) if not n.startswith("fc.")} == set()


def test_chain_after_transfer_continues_with_its_task(tiny_task: Task, tiny_model: Maker) -> None:
    outcome = run("transfer:epochs=1,batch=16+ftal:epochs=1,batch=16", tiny_model(), tiny_task)
    assert outcome.task is not None and outcome.task.classes == 2
    assert last_layer(outcome.model).out_features == 2


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({}, "Pass --transfer-task"),
        ({"transfer_task": other_task(channels=3)}, "The other task has images of 3x24x24"),
    ],
)
def test_transfer_without_fitting_task_is_not_applicable(
    resources: dict[str, Any], message: str, tiny_task: Task, tiny_model: Maker
) -> None:
    with pytest.raises(NotApplicableError, match=message):
        run("transfer:to=task", tiny_model(), tiny_task, **resources)


def test_half_of_three_classes_is_not_applicable() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(576, 3))
    with pytest.raises(NotApplicableError, match="Half of 3 classes is no task"):
        run("transfer", network, other_task())


def test_key_samples_of_missing_classes_are_not_verifiable(tiny_task: Task, tiny_model: Maker) -> None:
    scheme = make_scheme("adi", key_size=40)
    model = tiny_model()
    key = scheme.generate_key(model, tiny_task, 0)
    outcome = run("transfer:epochs=1,batch=16", model, tiny_task)
    detection = scheme.verify(outcome.model, key)
    assert detection.status == "not_verifiable" and "has 2 outputs" in str(detection.reason)
