from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision

from mtlsign.config.embed import MAX_WIDTH, EmbedSettings
from mtlsign.errors import SettingsError
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.families.resnet import RESNETS
from mtlsign.models.taps import forward_to_taps


@pytest.mark.parametrize("arch", RESNETS)
def test_resnet_of_width_64_has_torchvision_tensors(arch: str) -> None:
    with torch.device("meta"):
        ours = build(architecture_for(arch, channels=3, classes=1000)).state_dict()
        theirs = getattr(torchvision.models, arch)().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert list(ours) == list(theirs)


def test_resnet_of_width_64_computes_torchvision_outputs() -> None:
    ours = build(architecture_for("resnet18", channels=3, classes=1000)).eval()
    theirs = torchvision.models.resnet18().eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("arch", "factor"), [("resnet18", 1), ("resnet50", 4)])
@pytest.mark.parametrize(("stem", "side"), [("stock", 8), ("cifar", 32)])
def test_narrow_resnet_has_scaled_feature_maps(arch: str, factor: int, stem: str, side: int) -> None:
    model: Any = build(architecture_for(arch, channels=1, classes=10, width=8, stem=stem)).eval()
    x = torch.rand(2, 1, 32, 32)
    assert model(x).shape == (2, 10)
    first, third = forward_to_taps(model, x, ["layer1", "layer3"])
    assert first.shape == (2, 8 * factor, side, side)
    assert third.shape == (2, 32 * factor, side // 4, side // 4)
    swapped = forward_to_taps(model, x, ["layer3", "layer1"])
    assert torch.equal(swapped[0], third) and torch.equal(swapped[1], first)


def test_width_limit_is_that_of_settings() -> None:
    assert architecture_for("resnet18", channels=1, classes=4, width=MAX_WIDTH)["width"] == MAX_WIDTH
    assert EmbedSettings.of({"width": MAX_WIDTH}).width == MAX_WIDTH
    with pytest.raises(SettingsError, match="width"):
        EmbedSettings.of({"width": MAX_WIDTH + 1})
