from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.taps import forward_to_taps, tapped_buffers, tapped_layers, tapped_parameters


def narrow(arch: str = "resnet18", stem: str = "cifar", width: int = 8) -> Any:
    return build(architecture_for(arch, channels=1, classes=10, width=width, stem=stem)).eval()


def test_forward_to_taps_computes_nothing_after_last_tap() -> None:
    model = narrow()
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, a, name=name: calls.append(name))
    forward_to_taps(model, torch.rand(1, 1, 32, 32), ["layer2", "layer1"])
    assert calls[-1] == "layer2.1.relu"
    assert not any(name.startswith(("layer3", "layer4", "fc")) for name in calls)
    assert not any(module._forward_hooks for module in model.modules())


def test_forward_to_taps_removes_hooks_after_error() -> None:
    model = narrow()
    with pytest.raises(RuntimeError):
        forward_to_taps(model, torch.rand(1, 3, 32, 32), ["layer1"])
    assert not any(module._forward_hooks for module in model.modules())


def test_forward_to_taps_protects_early_tap_from_in_place_operations() -> None:
    model = narrow()
    x = torch.rand(2, 1, 32, 32)
    (alone,) = forward_to_taps(model, x, ["layer1.0.bn1"])
    both = forward_to_taps(model, x, ["layer1.0.bn1", "layer1"])
    assert (alone < 0).any()
    assert torch.equal(alone, both[0])


def test_forward_to_taps_supports_autograd_and_functional_call() -> None:
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


class UnusualNetwork(nn.Module):
    """A module that is never called, one that gives a tuple, one that runs twice, and swallowed errors."""

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
def test_forward_to_taps_with_unusable_tap_names_nearest(tap: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        forward_to_taps(UnusualNetwork(), torch.rand(1, 2), [tap])


def test_forward_to_taps_returns_tensor_of_first_call() -> None:
    model, x = UnusualNetwork(), torch.rand(1, 2)
    with pytest.raises(ModelError, match="not a tensor"):
        forward_to_taps(model, x, ["pair"])
    with pytest.raises(ModelError, match="No tap"):
        forward_to_taps(model, x, [])
    assert torch.equal(forward_to_taps(model, x, ["twice", "twice"])[1], model.twice(x))


def test_tapped_layers_of_resnet18_pair_convolutions_with_batch_norms() -> None:
    model = narrow("resnet18").train()
    layers = tapped_layers(model, ["layer2"], torch.rand(1, 1, 32, 32))
    pairs = [(layer.conv, layer.batch_norm) for layer in layers]
    assert pairs[:3] == [
        ("conv1", "bn1"),
        ("layer1.0.conv1", "layer1.0.bn1"),
        ("layer1.0.conv2", "layer1.0.bn2"),
    ]
    assert ("layer2.0.downsample.0", "layer2.0.downsample.1") in pairs
    assert len(layers) == 10 and {layer.kind for layer in layers} == {"conv"}
    assert all(module.training for module in model.modules())
    assert int(model.bn1.num_batches_tracked) == 0


def test_tapped_layers_of_resnet50_pair_convolutions_with_batch_norms() -> None:
    layers = tapped_layers(narrow("resnet50"), ["layer1"], torch.rand(1, 1, 32, 32))
    assert len(layers) == 11
    for layer in layers:
        assert layer.batch_norm == layer.conv.replace("conv", "bn").replace("downsample.0", "downsample.1")


def test_tapped_parameters_are_those_read_before_tap() -> None:
    model, x = narrow(), torch.rand(1, 1, 32, 32)
    names = tapped_parameters(model, ["layer1"], x)
    assert "bn1.running_var" in names and "bn1.bias" in names and "bn1.num_batches_tracked" not in names
    assert not any(name.startswith(("layer2", "fc")) for name in names)
    assert set(tapped_parameters(model, ["layer1"], x, buffers=False)) == {
        name for name, _ in model.named_parameters() if name.startswith(("conv1", "bn1", "layer1"))
    }


class InPlaceActivation(nn.Module):
    """An activation in place between a convolution and its batch norm, which so gets another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.b, self.bn = nn.Conv2d(2, 2, 3, groups=2), nn.BatchNorm2d(2)
        self.spot = nn.Parameter(torch.ones(1, 2, 1, 1))
        self.end = nn.Identity()

    def forward(self, x: Any) -> Any:
        x = self.an(torch.relu_(self.a(x)))
        return self.end(self.bn(self.b(x * self.spot)))


def test_tapped_layers_pair_direct_consumers_only() -> None:
    layers = tapped_layers(InPlaceActivation(), ["end"], torch.rand(1, 1, 9, 9))
    assert [(layer.conv, layer.batch_norm, layer.kind, layer.weight) for layer in layers] == [
        ("a", None, "conv", "a.weight"),
        ("", None, "other", "spot"),
        ("b", "bn", "conv", "b.weight"),
    ]


def test_tapped_layers_work_in_inference_mode() -> None:
    with torch.inference_mode():
        layers = tapped_layers(narrow(), ["layer1"], torch.rand(1, 1, 32, 32))
    assert all(layer.batch_norm for layer in layers)


class BufferedNetwork(nn.Module):
    """A network whose forward pass reads buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1))
        self.register_buffer("deviation", torch.rand(1) + 1, persistent=False)
        self.register_buffer("index", torch.tensor([1, 0]))
        self.register_buffer("unused", torch.rand(1))
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.tracked = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
        self.end = nn.Identity()
        self.register_buffer("late", torch.rand(1))

    def forward(self, x: Any) -> Any:
        x = self.norm(self.conv((x - self.mean) / self.deviation))[:, self.index]
        return self.end(self.tracked(x)) + self.late


def test_tapped_buffers_are_those_read_before_tap_without_batch_norms() -> None:
    names = tapped_buffers(BufferedNetwork(), ["end"], torch.rand(1, 1, 9, 9))
    assert sorted(names) == ["deviation", "mean", "tracked.running_mean", "tracked.running_var"]
