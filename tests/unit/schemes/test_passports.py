"""Passports: their layers, their composition, and the private branch."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from mtlsign.errors import ModelError
from mtlsign.schemes.passport_layers import draw_passports, passport_layers
from mtlsign.schemes.passports import PassportKey, PassportScheme
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import Maker, flat_network

SCHEME = PassportScheme(key_size=64, passport_images=4, samples=20, min_evidence_bits=20.0)


def with_fitting_bits(model: nn.Module, key: PassportKey) -> PassportKey:
    """The key with the signs that the model has."""
    with torch.no_grad():
        return replace(key, bits=(SCHEME.scores(model, key) > 0).float())


def test_layers_are_last_convolutions_with_batch_norms(tiny_task: Task, tiny_model: Maker) -> None:
    model = tiny_model()
    layers = passport_layers(model, tiny_task.input_spec.sample(2), 100)
    assert [layer.convolution.rsplit(".", 1)[-1] for layer in layers] == ["conv2", "conv1"]
    assert [layer.norm.rsplit(".", 1)[-1] for layer in layers] == ["bn2", "bn1"]
    assert all(layer.convolution.split(".")[:-1] == layer.norm.split(".")[:-1] for layer in layers)
    assert all(layer.shape[0] == 64 for layer in layers)
    with pytest.raises(ModelError, match="needs 65,536 channels"):
        passport_layers(model, tiny_task.input_spec.sample(2), 65_536)
    with pytest.raises(ModelError, match="the network has 0"):
        passport_layers(flat_network(), tiny_task.input_spec.sample(2), 4)


def test_passport_holds_activations_of_every_image(tiny_task: Task, tiny_model: Maker) -> None:
    model, images = tiny_model(), torch.randn(3, 1, 24, 24)
    (layer,) = passport_layers(model, images, 64)
    activations: list[torch.Tensor] = []
    handle = model.get_submodule(layer.convolution).register_forward_pre_hook(
        lambda module, arguments: activations.append(arguments[0])
    )
    model(images)
    handle.remove()
    (passport,) = draw_passports(model, [layer], images, torch.Generator().manual_seed(0))
    assert passport.shape == activations[0][:1].shape
    for position in range(6):
        maps = activations[0][position % 3]
        assert any(torch.equal(passport[0, position], one) for one in maps)


def test_private_branch_with_public_values_is_public_branch(tiny_task: Task, tiny_model: Maker) -> None:
    model = tiny_model()
    key = SCHEME.generate_key(model, tiny_task, 1)
    norm = model.get_submodule(key.layers[0].norm)
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight.copy_(key.layers[0].response(model, key.scales[0]))
        norm.bias.copy_(key.layers[0].response(model, key.shifts[0]))
        assert torch.allclose(SCHEME.private_outputs(model, key, key.inputs), model(key.inputs))
        norm.bias.add_(1.0)
        assert not torch.allclose(SCHEME.private_outputs(model, key, key.inputs), model(key.inputs))


def test_matching_signs_without_private_accuracy_are_rejected(tiny_task: Task, tiny_model: Maker) -> None:
    model = tiny_model()
    key = with_fitting_bits(model, SCHEME.generate_key(model, tiny_task, 1))
    with torch.no_grad():
        answers = model(key.inputs).argmax(1)
    measured = replace(key, classes=answers, shifts=tuple(9.0 * p for p in key.shifts))
    private, public = SCHEME.private_accuracy(model, measured)
    assert public == 1.0 and private < 0.95
    detection = SCHEME.verify(model, measured)
    assert (detection.matched, detection.status, detection.accepted) == (64, "rejected", False)
    assert detection.reason is not None and "instead of 1.000" in detection.reason
    lenient = replace(SCHEME, tolerance=1.0).verify(model, measured)
    assert lenient.accepted and lenient.reason is None


def test_network_without_the_batch_norm_is_not_verifiable(tiny_task: Task, tiny_model: Maker) -> None:
    model = tiny_model()
    key = SCHEME.generate_key(model, tiny_task, 1)
    folded = copy.deepcopy(model)
    parent, _, leaf = key.layers[0].norm.rpartition(".")
    setattr(folded.get_submodule(parent), leaf, nn.Identity())
    detection = SCHEME.verify(folded, key)
    assert detection.status == "not_verifiable"
    assert detection.reason is not None and key.layers[0].norm in detection.reason


def test_regression_task_is_not_supported(tiny_task: Task, tiny_model: Maker) -> None:
    reason = SCHEME.unsupported_reason(tiny_model(), replace(tiny_task, targets="values"))
    assert reason == "Passports are made from images. Use a task that classifies images."
