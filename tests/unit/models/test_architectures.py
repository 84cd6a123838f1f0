from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mtlsign.errors import ModelError
from mtlsign.models.architectures import architecture_for, build, default_taps
from mtlsign.models.taps import forward_to_taps, tapped_layers


def narrow(arch: str = "resnet18", stem: str = "cifar", width: int = 8) -> Any:
    return build(architecture_for(arch, channels=1, classes=10, width=width, stem=stem)).eval()


@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"arch": "resnet101", "channels": 1, "classes": 10},
        {"arch": "resnet18", "channels": 1, "classes": 10},
        {"arch": "resnet18", "channels": 1, "classes": 10, "width": 16, "stem": "stock", "pretrained": 1},
        {"arch": "resnet18", "channels": 1, "classes": 10, "width": 10_000, "stem": "stock"},
        {"arch": "resnet18", "channels": 1, "classes": 10, "width": 129, "stem": "stock"},
        {"arch": "resnet18", "channels": True, "classes": 10, "width": 16, "stem": "stock"},
        {"arch": "resnet18", "channels": 1, "classes": 10, "width": 16, "stem": "other"},
        {"arch": "resnet18", "channels": 1, "classes": 10, "width": 16, "stem": ["stock"]},
        {"arch": "timm/hf-hub:someone/model", "channels": 1, "classes": 10},
        {"arch": "timm/no_such_network", "channels": 1, "classes": 10},
        {"arch": "timm/test_vit", "channels": 1, "classes": 10, "size": 5},
        {"arch": "custom/os:system"},
        {"arch": "custom/../x", "channels": 1, "classes": 10},
        {"arch": 7},
    ],
)
def test_build_of_architecture_outside_allow_list_raises_model_error(architecture: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        build(architecture)


def test_build_names_invalid_field() -> None:
    with pytest.raises(ModelError, match=r"^width: 129 is not a whole number from 4 to 128"):
        architecture_for("resnet18", channels=1, classes=10, width=129)
    with pytest.raises(ModelError, match=r"^stem: 'other' is not supported. Use one of stock, cifar"):
        architecture_for("resnet18", channels=1, classes=10, stem="other")
    with pytest.raises(ModelError, match=r"^model: Unknown architecture 'vgg'. Use one of resnet18"):
        architecture_for("vgg", channels=1, classes=10)


def test_build_of_old_prefix_names_new_one() -> None:
    with pytest.raises(ModelError, match=r"^model: The prefix 'own/' of architectures was renamed. Use 'cus"):
        build({"arch": "own/package.module:function"})


def test_default_taps_are_first_stages() -> None:
    assert default_taps(narrow(), "keyed") == ("layer1",)
    assert default_taps(narrow(), "free") == ("layer1", "layer2", "layer3")


def test_default_taps_of_unknown_network_raises_model_error() -> None:
    with pytest.raises(ModelError, match="--taps"):
        default_taps(nn.Sequential(nn.Linear(2, 2)), "keyed")


def test_build_of_timm_name_has_stages_and_batch_norms() -> None:
    model = build(architecture_for("timm/test_byobnet", channels=1, classes=10))
    taps = default_taps(model, "free")
    assert taps == ("stages.0", "stages.1", "stages.2")
    x = torch.rand(1, 1, 32, 32)
    assert len(forward_to_taps(model, x, taps)) == 3
    layers = tapped_layers(model, taps[:1], x)
    convolutions = [layer for layer in layers if layer.kind == "conv"]
    assert any(layer.batch_norm for layer in convolutions)
    assert all(
        layer.batch_norm is None or layer.batch_norm.rpartition(".")[0] == layer.conv.rpartition(".")[0]
        for layer in layers
    )


def test_build_of_timm_network_without_batch_norm_has_layers() -> None:
    model = build(architecture_for("timm/test_convnext", channels=3, classes=10))
    layers = tapped_layers(model, default_taps(model, "keyed"), torch.rand(1, 3, 32, 32))
    assert layers and all(layer.batch_norm is None for layer in layers)


def test_build_of_timm_transformer_takes_size() -> None:
    model = build(architecture_for("timm/test_vit", channels=1, classes=10, size=32))
    taps = default_taps(model, "keyed")
    assert taps == ("blocks.0",)
    layers = tapped_layers(model, taps, torch.rand(1, 1, 32, 32))
    assert {"conv", "linear", "other"} == {layer.kind for layer in layers}


def test_build_of_huge_timm_model_is_rejected_before_allocation() -> None:
    with pytest.raises(ModelError, match="parameters"):
        build(architecture_for("timm/vit_giant_patch14_224", channels=3, classes=10))


def small_network(channels: int = 1, classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.LazyLinear(classes))


def test_build_of_custom_architecture_uses_given_factories_only() -> None:
    path = f"{__name__}:small_network"
    architecture = architecture_for(f"custom/{path}", channels=2, classes=3)
    with pytest.raises(ModelError, match="not registered"):
        build(architecture)
    model: Any = build(architecture, factories={path: small_network})
    assert model[0].in_channels == 2
    with pytest.raises(ModelError, match="must return"):
        build(architecture, factories={path: dict})  # type: ignore[dict-item]


def _broken(**_: object) -> None:
    raise KeyError("no such layer")


def test_build_with_failing_factory_names_error_and_line() -> None:
    with pytest.raises(
        ModelError, match=r"model: .*my:make.*KeyError.*no such layer.*test_architectures\.py, line"
    ):
        build({"arch": "custom/my:make"}, factories={"my:make": _broken})
