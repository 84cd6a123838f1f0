"""Permuted and scaled channels of real modules; the networks are those of the attack tests."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.channel_groups import (
    batch_norm_of_conv,
    network_channels,
    permute_channels,
    random_orders,
    scale_channels,
    writing_kernels,
)
from tests.unit.attacks.helpers import NETWORKS, network

X = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(3))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.double()(X.double())
    return result


@pytest.mark.parametrize(("arch", "inner"), [("resnet18", 8), ("resnet50", 33)])
def test_network_channels_of_resnet_are_inner_and_residual_sets(arch: str, inner: int) -> None:
    model = build(architecture_for(arch, channels=1, classes=4, width=8))
    sets = network_channels(model, torch.zeros(2, 1, 64, 64)).sets
    writers = Counter(len(writing_kernels(model, channels)) > 1 for channels in sets)
    # A residual set ends at each downsampling block. Before a first block that downsamples, the stem is
    # the only kernel that writes.
    assert (writers[False], writers[True]) == (inner, 4)
    assert any("fc.weight" in channels.columns for channels in sets)
    tensors = dict(model.named_parameters())
    for channels in sets:
        assert all(len(tensors[name]) == channels.size for name in channels.rows)
        assert all(tensors[name].shape[1] == channels.size for name in channels.columns)


class Unused(nn.Module):
    """Network whose last layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def test_network_channels_end_at_the_last_layer_that_is_called() -> None:
    (channels,) = network_channels(Unused(), X).sets
    assert channels.size == 3
    assert set(channels.rows) == {"first.weight"} and set(channels.columns) == {"second.weight"}


def test_network_channels_of_a_network_that_calls_no_module_raises_model_error() -> None:
    model = Unused()
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="never calls"):
        network_channels(model, X)


def test_depthwise_kernel_is_no_writing_kernel() -> None:
    model = network("depthwise")
    (channels,) = (c for c in network_channels(model, X).sets if "depthwise.weight" in c.rows)
    assert writing_kernels(model, channels) == ["expand.weight", "excite.weight"]


@pytest.mark.parametrize("name", NETWORKS)
def test_permute_channels_changes_every_kernel_and_no_output(name: str) -> None:
    model, changed = network(name), network(name)
    sets = network_channels(model, X).sets
    orders = random_orders(sets, lambda _: True, torch.Generator().manual_seed(0))
    permute_channels(changed, sets, orders)
    for (kernel, before), after in zip(model.named_parameters(), changed.parameters(), strict=True):
        assert before.dim() < 2 or not torch.equal(before, after), kernel
    torch.testing.assert_close(outputs(changed), outputs(model), rtol=0, atol=1e-12)


def test_random_orders_of_grouped_convolution_move_blocks_together() -> None:
    sets = network_channels(network("grouped"), X).sets
    orders = random_orders(sets, lambda _: True, torch.Generator().manual_seed(0))
    inputs, outputs_ = (
        next(i for i, c in enumerate(sets) if key in c.rows) for key in ("reduce.weight", "grouped.weight")
    )
    blocks = [orders[i].reshape(4, -1) // (sets[i].size // 4) for i in (inputs, outputs_)]
    assert torch.equal(blocks[0][:, 0], blocks[1][:, 0]) and (blocks[0] == blocks[0][:, :1]).all()
    alone = random_orders(sets, lambda c: c is sets[inputs], torch.Generator().manual_seed(0))
    assert list(alone) == [inputs] and torch.equal(
        alone[inputs].reshape(4, 2) // 2, torch.arange(4)[:, None].expand(4, 2)
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_scale_channels_without_gate_changes_no_output(name: str) -> None:
    model, changed = network(name), network(name)
    batch_norms = batch_norm_of_conv(model, X)
    for index, channels in enumerate(network_channels(model, X).sets):
        if "excite.weight" not in channels.rows:  # the gate's sigmoid is not linear
            factors = torch.exp(torch.randn(channels.size, generator=torch.Generator().manual_seed(index)))
            scale_channels(changed, channels, factors, batch_norms)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), changed.parameters(), strict=True))
    torch.testing.assert_close(outputs(changed), outputs(model), rtol=0, atol=1e-5)


def test_scale_channels_of_norm_before_activation_changes_no_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)),
    ).eval()
    model[2].running_mean.normal_()  # type: ignore[index, union-attr, operator]
    expected = outputs(model)
    for channels in network_channels(model.float(), X).sets:
        factors = torch.linspace(0.5, 2, channels.size)
        scale_channels(model, channels, factors, batch_norm_of_conv(model, X))
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-5)
