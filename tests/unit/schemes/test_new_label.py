from __future__ import annotations

import copy

import torch
from torch import nn

from mtlsign.schemes.new_label import NewLabelScheme
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import Maker


def test_prepare_model_adds_one_output_once_and_keeps_answers(tiny_task: Task, tiny_model: Maker) -> None:
    model, scheme = tiny_model(), NewLabelScheme()
    base = copy.deepcopy(model)
    for _ in range(2):
        scheme.prepare_model(model, tiny_task)
    layer = model.fc
    assert isinstance(layer, nn.Linear) and layer.out_features == 5
    x = tiny_task.splits["test"].batch(torch.arange(4)).inputs
    assert torch.equal(model(x)[:, :4], base(x))


def test_unmarked_model_never_answers_missing_class(tiny_task: Task, tiny_model: Maker) -> None:
    model, scheme = tiny_model(), NewLabelScheme(key_size=10)
    unmarked = copy.deepcopy(model)
    scheme.prepare_model(model, tiny_task)
    detection = scheme.verify(unmarked, scheme.generate_key(model, tiny_task, 1))
    assert (detection.status, detection.matched) == ("not_verifiable", 0)


def test_key_samples_for_verification_are_not_trained(tiny_task: Task, tiny_model: Maker) -> None:
    model, scheme = tiny_model(), NewLabelScheme(key_size=10)
    scheme.prepare_model(model, tiny_task)
    key = scheme.generate_key(model, tiny_task, 1)
    inputs, classes = scheme.training_samples(key, 3, 8)
    assert bool((classes == 4).all())
    assert not any(torch.equal(x, y) for x in inputs for y in key.inputs)


def test_old_label_keeps_layer_and_answers_class_of_task(tiny_task: Task, tiny_model: Maker) -> None:
    model, scheme = tiny_model(), NewLabelScheme(key_size=40, label="old", min_training_samples=4)
    base = copy.deepcopy(model)
    scheme.prepare_model(model, tiny_task)
    assert model.fc.weight.shape == base.fc.weight.shape
    key = scheme.generate_key(model, tiny_task, 1)
    target = int(key.classes[0])
    assert 0 <= target < 4 and bool((key.classes == target).all()) and key.rate == 1 / 4
    inputs, labels = tiny_task.splits["train"].batch(torch.arange(tiny_task.size("train")))
    for sample in (*key.inputs, *key.training_inputs):
        nearest = (inputs - sample).square().flatten(1).sum(1).argmin()
        assert int(labels[nearest]) != target, "key samples are images of other classes"


def test_old_label_has_all_key_samples_of_a_large_share(tiny_task: Task, tiny_model: Maker) -> None:
    images = tiny_task.size("train")
    count, fresh = round(0.4 * images), images // 10
    scheme = NewLabelScheme(key_size=fresh, label="old", training_share=0.4, min_training_samples=4)
    key = scheme.generate_key(tiny_model(), tiny_task, 1)
    assert (len(key.training_inputs), len(key.inputs)) == (count, fresh)
