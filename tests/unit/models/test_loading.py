from __future__ import annotations

import pytest
import torch
from torchvision import models

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ModelError
from mtlsign.models.architectures import build
from mtlsign.models.input_spec import ImageSpec
from mtlsign.models.loading import architecture_from_settings, cpu_state, load_tensors


def settings(model: str) -> EmbedSettings:
    return EmbedSettings.of({"model": model}).with_defaults()


def test_architecture_of_fixed_size_network_has_the_size_of_the_task() -> None:
    architecture = architecture_from_settings(settings("timm/vit_tiny_patch16_224"), ImageSpec(1, 32, 32, 10))
    assert architecture["size"] == 32
    with pytest.raises(ModelError, match="reads square images"):
        architecture_from_settings(settings("timm/vit_tiny_patch16_224"), ImageSpec(1, 32, 48, 10))


def test_architecture_of_other_networks_has_no_size() -> None:
    architecture = architecture_from_settings(settings("timm/test_resnet"), ImageSpec(3, 32, 48, 10))
    assert "size" not in architecture
    assert build(architecture).eval()(torch.zeros(1, 3, 32, 48)).shape == (1, 10)


def test_load_tensors_accepts_networks_that_need_version_numbers() -> None:
    model, other = (models.mnasnet0_5(num_classes=2) for _ in range(2))
    load_tensors(other, cpu_state(model))
    assert torch.equal(other.classifier[1].weight, model.classifier[1].weight)
    with pytest.raises(RuntimeError):
        load_tensors(other, {})
