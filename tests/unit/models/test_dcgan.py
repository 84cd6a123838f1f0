"""Generator and discriminator."""

from __future__ import annotations

import pytest
import torch

from mtlsign.errors import ModelError
from mtlsign.models import architectures
from mtlsign.models.dcgan import DCGAN, LATENT


@pytest.mark.parametrize(("channels", "side", "norms"), [(1, 8, 2), (1, 28, 3), (3, 32, 4)])
def test_network_generates_images_of_every_size(channels: int, side: int, norms: int) -> None:
    model = DCGAN(channels=channels, classes=channels * side * side, width=4)
    images = model(torch.zeros(2, LATENT))
    assert isinstance(images, torch.Tensor) and images.shape == (2, channels, side, side)
    assert bool((images.abs() <= 1).all())
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == norms
    outputs = model(torch.zeros(2, LATENT), images.detach())
    assert outputs["real"].shape == outputs["generated"].shape == outputs["convinced"].shape == (2,)
    assert torch.allclose(outputs["generated"], outputs["convinced"])


@pytest.mark.parametrize(("channels", "values"), [(1, 60), (1, 36), (3, 64), (1, 16)])
def test_values_of_no_square_image_raise_model_error(channels: int, values: int) -> None:
    with pytest.raises(ModelError, match="classes: The generator makes square images"):
        DCGAN(channels=channels, classes=values, width=4)


def test_generator_and_task_must_agree() -> None:
    with pytest.raises(ModelError, match="'resnet18' returns labels, and the task needs images"):
        architectures.architecture_for("resnet18", channels=1, classes=64, outputs="images")
    with pytest.raises(ModelError, match="'dcgan' returns images, and the task needs labels"):
        architectures.architecture_for("dcgan", channels=1, classes=10)
