"""Networks by name, taps by module name, and which weights lie before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.architectures import RESNETS, architecture_for, build, default_taps
from mtlsign.models.factories import load_factory
from mtlsign.models.taps import forward_to_taps, tapped_layers, tapped_parameters


def narrow(arch: str = "resnet18", stem: str = "cifar", width: int = 8) -> Any:
    return build(architecture_for(arch, channels=1, classes=10, width=width, stem=stem)).eval()


def small_network(channels: int = 1, classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.LazyLinear(classes))


@pytest.mark.parametrize("arch", RESNETS)
def test_width_64_is_torchvisions_own_model(arch: str) -> None:
    with torch.device("meta"):
        ours = build(architecture_for(arch, channels=3, classes=1000)).state_dict()
        theirs = getattr(torchvision.models, arch)().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert list(ours) == list(theirs)


def test_width_64_computes_what_torchvisions_own_model_does() -> None:
    ours = build(architecture_for("resnet18", channels=3, classes=1000)).eval()
    theirs = torchvision.models.resnet18().eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("arch", "factor"), [("resnet18", 1), ("resnet50", 4)])
@pytest.mark.parametrize(("stem", "side"), [("stock", 8), ("cifar", 32)])
def test_narrow_networks(arch: str, factor: int, stem: str, side: int) -> None:
    model = narrow(arch, stem)
    x = torch.rand(2, 1, 32, 32)
    assert model(x).shape == (2, 10)
    first, third = forward_to_taps(model, x, ["layer1", "layer3"])
    assert first.shape == (2, 8 * factor, side, side)
    assert third.shape == (2, 32 * factor, side // 4, side // 4)
    again = forward_to_taps(model, x, ["layer3", "layer1"])
    assert torch.equal(again[0], third) and torch.equal(again[1], first)


@pytest.mark.parametrize(
    "graph",
    [
        {},
        {"arch": "resnet101", "channels": 1, "classes": 10},
        {"arch": "resnet18", "channels": 1, "classes": 10},
        {"arch": "resnet18", "channels": 1, "classes": 10, "width": 16, "stem": "stock", "pretrained": 1},
        {"arch": "resnet18", "channels": 1, "classes": 10, "width": 10_000, "stem": "stock"},
        {"arch": "resnet18", "channels": True, "classes": 10, "width": 16, "stem": "stock"},
        {"arch": "resnet18", "channels": 1, "classes": 10, "width": 16, "stem": "other"},
        {"arch": "timm/hf-hub:someone/model", "channels": 1, "classes": 10},
        {"arch": "timm/no_such_network", "channels": 1, "classes": 10},
        {"arch": "own/os:system"},
        {"arch": "own/../x", "channels": 1, "classes": 10},
        {"arch": 7},
    ],
)
def test_only_listed_graphs_are_built(graph: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        build(graph)


def test_huge_timm_models_are_refused_before_they_are_allocated() -> None:
    with pytest.raises(ModelError, match="parameters"):
        build(architecture_for("timm/vit_giant_patch14_224", channels=3, classes=10))


def test_own_factories_come_from_the_caller_only() -> None:
    graph = architecture_for(f"own/{__name__}:small_network", channels=2, classes=3)
    with pytest.raises(ModelError, match="not registered"):
        build(graph)
    model: Any = build(graph, factories={f"{__name__}:small_network": small_network})
    assert model[0].in_channels == 2
    with pytest.raises(ModelError, match="must return"):
        build(graph, factories={f"{__name__}:small_network": dict})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "path", ["", "json", "json:", "json:dumps:x", "json:__doc__", "no_such_package:f", "a b:c"]
)
def test_unusable_factory_paths(path: str) -> None:
    with pytest.raises(ModelError):
        load_factory(path)


def test_load_factory() -> None:
    import json

    assert load_factory("json:dumps") is json.dumps


def test_nothing_past_the_last_tap_is_computed() -> None:
    model = narrow()
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, a, name=name: ran.append(name))
    forward_to_taps(model, torch.rand(1, 1, 32, 32), ["layer2", "layer1"])
    assert ran[-1] == "layer2.1.relu"
    assert not any(name.startswith(("layer3", "layer4", "fc")) for name in ran)
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_removed_after_an_error() -> None:
    model = narrow()
    with pytest.raises(RuntimeError):
        forward_to_taps(model, torch.rand(1, 3, 32, 32), ["layer1"])
    assert not any(module._forward_hooks for module in model.modules())


def test_an_early_tap_survives_later_in_place_operations() -> None:
    model = narrow()
    x = torch.rand(2, 1, 32, 32)
    (alone,) = forward_to_taps(model, x, ["layer1.0.bn1"])
    both = forward_to_taps(model, x, ["layer1.0.bn1", "layer1"])
    assert (alone < 0).any()
    assert torch.equal(alone, both[0])


def test_gradients_and_functional_calls() -> None:
    model = narrow()
    x = torch.rand(2, 1, 32, 32)
    forward_to_taps(model, x, ["layer1"])[0].sum().backward()  # type: ignore[no-untyped-call]
    assert model.conv1.weight.grad is not None and model.layer2[0].conv1.weight.grad is None
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        def call(x: Tensor) -> Any:
            return torch.func.functional_call(model, values, (x,))

        return forward_to_taps(model, x, ["layer1"], call=call)[0].sum()

    gradients = torch.func.grad(loss)(values)
    assert torch.allclose(gradients["conv1.weight"], model.conv1.weight.grad, atol=1e-5)
    assert loss({**values, "bn1.bias": values["bn1.bias"] + 1}) != loss(values)
    assert not any(module._forward_hooks for module in model.modules())


class Odd(nn.Module):
    """A module that is never called, one that gives a tuple, one that runs twice, and errors swallowed."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.pair = nn.LSTM(2, 2)
        self.twice = nn.Linear(2, 2)
        self.table = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Any) -> Any:
        try:
            x = self.twice(self.twice(x) @ self.table)
        except Exception:
            return x
        return self.pair(x)[0]


@pytest.mark.parametrize(("tap", "text"), [("idle", "never calls"), ("twicee", "twice"), ("", "no module")])
def test_unusable_taps_name_the_nearest(tap: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        forward_to_taps(Odd(), torch.rand(1, 2), [tap])


def test_taps_are_tensors_from_the_first_call() -> None:
    model, x = Odd(), torch.rand(1, 2)
    with pytest.raises(ModelError, match="not a tensor"):
        forward_to_taps(model, x, ["pair"])
    with pytest.raises(ModelError, match="no tap"):
        forward_to_taps(model, x, [])
    assert torch.equal(forward_to_taps(model, x, ["twice", "twice"])[1], model.twice(x))


def test_resnet18_pairs_every_convolution_with_its_batch_norm() -> None:
    model = narrow("resnet18").train()
    layers = tapped_layers(model, ["layer2"], torch.rand(1, 1, 32, 32))
    assert [(layer.conv, layer.bn) for layer in layers[:3]] == [
        ("conv1", "bn1"),
        ("layer1.0.conv1", "layer1.0.bn1"),
        ("layer1.0.conv2", "layer1.0.bn2"),
    ]
    assert ("layer2.0.downsample.0", "layer2.0.downsample.1") in [(layer.conv, layer.bn) for layer in layers]
    assert len(layers) == 10 and {layer.kind for layer in layers} == {"conv"}
    assert all(module.training for module in model.modules())
    assert int(model.bn1.num_batches_tracked) == 0


def test_resnet50_pairs_every_convolution_with_its_batch_norm() -> None:
    layers = tapped_layers(narrow("resnet50"), ["layer1"], torch.rand(1, 1, 32, 32))
    assert len(layers) == 11
    for layer in layers:
        assert layer.bn == layer.conv.replace("conv", "bn").replace("downsample.0", "downsample.1")


def test_tapped_parameters_are_those_that_matter() -> None:
    model, x = narrow(), torch.rand(1, 1, 32, 32)
    names = tapped_parameters(model, ["layer1"], x)
    assert "bn1.running_var" in names and "bn1.bias" in names and "bn1.num_batches_tracked" not in names
    assert not any(name.startswith(("layer2", "fc")) for name in names)
    assert set(tapped_parameters(model, ["layer1"], x, buffers=False)) == {
        name for name, _ in model.named_parameters() if name.startswith(("conv1", "bn1", "layer1"))
    }


class Between(nn.Module):
    """An activation in place between a convolution and its batch norm, which so does not take its output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.b, self.bn = nn.Conv2d(2, 2, 3, groups=2), nn.BatchNorm2d(2)
        self.spot = nn.Parameter(torch.ones(1, 2, 1, 1))
        self.end = nn.Identity()

    def forward(self, x: Any) -> Any:
        x = self.an(torch.relu_(self.a(x)))
        return self.end(self.bn(self.b(x * self.spot)))


def test_only_direct_consumers_are_paired() -> None:
    layers = tapped_layers(Between(), ["end"], torch.rand(1, 1, 9, 9))
    assert [(layer.conv, layer.bn, layer.kind, layer.weight) for layer in layers] == [
        ("a", None, "conv", "a.weight"),
        ("", None, "other", "spot"),
        ("b", "bn", "conv", "b.weight"),
    ]


def test_timm_models_by_name() -> None:
    pytest.importorskip("timm")
    model = build(architecture_for("timm/test_byobnet", channels=1, classes=10))
    taps = default_taps(model, "free")
    assert taps == ("stages.0", "stages.1", "stages.2")
    x = torch.rand(1, 1, 32, 32)
    assert len(forward_to_taps(model, x, taps)) == 3
    layers = tapped_layers(model, taps[:1], x)
    convolutions = [layer for layer in layers if layer.kind == "conv"]
    assert any(layer.bn for layer in convolutions)
    assert all(
        layer.bn is None or layer.bn.rpartition(".")[0] == layer.conv.rpartition(".")[0] for layer in layers
    )


def test_timm_network_without_batch_norm() -> None:
    pytest.importorskip("timm")
    model = build(architecture_for("timm/test_convnext", channels=3, classes=10))
    layers = tapped_layers(model, default_taps(model, "keyed"), torch.rand(1, 3, 32, 32))
    assert layers and all(layer.bn is None for layer in layers)


def test_timm_transformers_take_a_size() -> None:
    pytest.importorskip("timm")
    model = build(architecture_for("timm/test_vit", channels=1, classes=10, size=32))
    taps = default_taps(model, "keyed")
    assert taps == ("blocks.0",)
    layers = tapped_layers(model, taps, torch.rand(1, 1, 32, 32))
    assert {"conv", "linear", "other"} == {layer.kind for layer in layers}


def test_default_taps() -> None:
    assert default_taps(narrow(), "keyed") == ("layer1",)
    assert default_taps(narrow(), "free") == ("layer1", "layer2", "layer3")
    with pytest.raises(ModelError, match="--taps"):
        default_taps(Odd(), "keyed")


def test_layers_are_found_in_inference_mode_too() -> None:
    with torch.inference_mode():
        layers = tapped_layers(narrow(), ["layer1"], torch.rand(1, 1, 32, 32))
    assert all(layer.bn for layer in layers)


def _broken(**_: object) -> None:
    raise KeyError("no such layer")


def test_a_factory_that_raises_is_told_in_one_line_with_its_place() -> None:
    with pytest.raises(
        ModelError, match=r"model: .*my:make.*KeyError.*no such layer.*test_backbone\.py, line"
    ):
        build({"arch": "own/my:make"}, factories={"my:make": _broken})


@pytest.mark.parametrize("field", ["model", "task"])
def test_a_bad_factory_path_names_the_setting_that_held_it(field: str) -> None:
    with pytest.raises(ModelError, match=f"^{field}: "):
        load_factory("json:dumpz", field=field)
