from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from mtlsign.models.architectures import architecture_for, build, default_taps
from mtlsign.models.stages import stages_of


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 1))


class SkipNetwork(nn.Module):
    """A network that keeps the features of its first stage until its end."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = block(3, 4), block(4, 8, 2)
        self.up, self.end = nn.ConvTranspose2d(8, 4, 2, 2), block(8, 4)

    def forward(self, x: Tensor) -> Any:
        first = self.down1(x)
        return self.end(torch.cat([self.up(self.down2(first)), first], 1))


def test_stages_of_resnet_are_its_layers() -> None:
    model = build(architecture_for("resnet18", channels=3, classes=2, width=4))
    sample = torch.zeros(2, 3, 64, 64)
    assert stages_of(model, sample) == ["layer1", "layer2", "layer3", "layer4"]
    assert default_taps(model, "keyed", sample) == default_taps(model, "keyed")


def test_stages_of_network_with_skip_connections_end_before_resolution_changes() -> None:
    assert stages_of(SkipNetwork(), torch.zeros(2, 3, 16, 16)) == ["down1", "down2", "end"]


@pytest.mark.parametrize(
    ("model", "first"),
    [
        (models.mobilenet_v3_small(num_classes=2), "features.1"),
        (models.VisionTransformer(16, 8, 2, 2, 8, 8), "encoder.layers.encoder_layer_0"),
        (models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2]), "features.1"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()), "2"),
    ],
)
def test_default_taps_come_from_data_flow(model: nn.Module, first: str) -> None:
    sample = torch.zeros(2, 3, 16, 16)
    assert default_taps(model.train(), "keyed", sample) == (first,)
    assert default_taps(model, "spread", sample) and model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_stages_of_network_without_positions_are_empty() -> None:
    assert stages_of(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.zeros(2, 3, 2, 2)) == []
