from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.errors import ModelError
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.channel_groups import find_channel_groups


@pytest.mark.parametrize(("arch", "inner"), [("resnet18", 8), ("resnet50", 32)])
def test_find_channel_groups_of_resnet_gives_inner_and_residual_groups(arch: str, inner: int) -> None:
    with torch.device("meta"):
        model = build(architecture_for(arch, channels=1, classes=4, width=8))
    groups = find_channel_groups(model)
    places = [group.place for group in groups]
    # a residual group ends at each downsampling block and at the last layer
    residual = 4 if arch == "resnet18" else 5
    assert (places.count("inner"), places.count("residual")) == (inner, residual)
    assert groups[-1].consumers[-1] == "fc"
    modules = dict(model.named_modules())
    for group in groups:
        for conv, _ in group.producers:
            assert modules[conv].out_channels == group.size
        for name in group.consumers:
            assert modules[name].weight.shape[1] == group.size  # type: ignore[union-attr]


def test_find_channel_groups_of_unknown_network_raises_model_error() -> None:
    with pytest.raises(ModelError, match="channel groups of Sequential"):
        find_channel_groups(nn.Sequential(nn.Conv2d(1, 2, 3)))


def test_find_channel_groups_with_grouped_convolution_raises_model_error() -> None:
    model = build(architecture_for("resnet18", channels=1, classes=4, width=8))
    model.layer1[0].conv2 = nn.Conv2d(8, 8, 3, groups=2)  # type: ignore[index, union-attr]
    with pytest.raises(ModelError, match="grouped convolutions"):
        find_channel_groups(model)
