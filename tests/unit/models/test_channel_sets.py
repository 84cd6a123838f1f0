from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from mtlsign.models.channel_groups import permute_channels
from mtlsign.models.channel_sets import ChannelSet, ChannelStructure, channel_structure, without_rows
from mtlsign.models.taps import last_layer
from tests.unit.models.channel_permutation import permuted_copy


class Mixed(nn.Module):
    """Residual, depthwise, grouped and concatenated convolutions, gates, and a flattened linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.depth, self.depth_norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.wide, self.grouped = nn.Conv2d(12, 16, 1), nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.back = nn.Conv2d(24, 12, 1)
        self.branch = nn.Conv2d(12, 5, 3, padding=1)
        self.hidden, self.head = nn.Linear(17 * 4, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.depth_norm(self.depth(x)))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.back(torch.relu(self.grouped(torch.relu(self.wide(y)))))
        x = torch.cat([x, self.branch(x)], 1)
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        logits: Tensor = self.head(torch.relu(self.hidden(x)))
        return logits


class Opaque(nn.Module):
    """Network whose channels pass an operation of unknown effect: a sort."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
        self.third = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        result: Tensor = self.third(self.second(self.first(x).sort(1).values))
        return result


def prepared(model: nn.Module) -> nn.Module:
    """Return the network in evaluation mode and float64, with random vectors."""
    torch.manual_seed(0)
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dim() == 1:
                tensor.data.uniform_(0.5, 1.5)
    return model.eval().double()


def structure_of(model: nn.Module, size: int) -> ChannelStructure:
    sample = torch.zeros(2, 3, size, size)
    return channel_structure(copy.deepcopy(model).float(), (last_layer(model),), sample)


def by_kernel(sets: list[ChannelSet] | tuple[ChannelSet, ...]) -> dict[str, ChannelSet]:
    return {name: members for members in sets for name in members.rows}


@pytest.mark.parametrize(
    ("name", "size", "rows"),
    [
        ("resnet18", 32, 4800), ("mobilenet_v2", 32, 17056), ("regnet_x_400mf", 32, 18928),
        ("squeezenet1_0", 64, 2976), ("shufflenet_v2_x0_5", 32, 3976), ("vgg11_bn", 32, None),
    ],
)  # fmt: skip
def test_permutation_of_every_channel_set_preserves_the_function(
    name: str, size: int, rows: int | None
) -> None:
    if name == "vgg11_bn":  # the classifier of ImageNet's networks has 120 million weights
        model: nn.Module = torchvision.models.vgg11_bn(weights=None, num_classes=10)
        model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(), nn.Linear(32, 10))
    else:
        model = torchvision.models.get_model(name, weights=None)
    prepared(model)
    structure = structure_of(model, size)
    if rows is not None:  # all rows but those of the last layer
        assert sum(len(index) for members in structure.sets for index in members.rows.values()) == rows
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    changed = permuted_copy(model, structure.sets)
    with torch.no_grad():
        torch.testing.assert_close(changed(images), model(images), rtol=1e-9, atol=1e-9)
    kernel = next(iter(structure.sets[0].rows))
    assert not torch.equal(changed.get_parameter(kernel), model.get_parameter(kernel))


def test_channel_structure_of_mixed_network_joins_what_belongs_together() -> None:
    model = prepared(Mixed())
    structure = structure_of(model, 8)
    sets = by_kernel(list(structure.sets))
    assert structure.input_kernels == {"stem.weight"}
    residual = sets["stem.weight"]
    assert set(residual.rows) == {"stem.weight", "depth.weight", "excite.weight", "back.weight"}
    assert set(residual.columns) == {"squeeze.weight", "wide.weight", "branch.weight", "hidden.weight"}
    assert residual.columns["hidden.weight"].shape == (12, 4), "four positions of each channel were flattened"
    assert {"norm.running_var", "depth.bias", "back.bias"} <= set(residual.vectors)
    assert sets["branch.weight"].columns["hidden.weight"][:, 0].tolist() == list(range(48, 68, 4))
    wide, grouped = sets["wide.weight"], sets["grouped.weight"]
    assert (wide.blocks, grouped.blocks) == (4, 4)
    assert structure.sets[wide.partner or 0] is grouped and structure.sets[grouped.partner or 0] is wide
    assert "head.weight" not in sets, "the order of the outputs is part of the function"
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        changed = permuted_copy(model, structure.sets)(images)
        torch.testing.assert_close(changed, model(images), rtol=1e-9, atol=1e-9)


class Merging(nn.Module):
    """Norm over the channels of four neighbouring positions, as in patch merging."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.reduction = nn.Conv2d(3, 6, 1), nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        x = self.first(x)
        patches = torch.cat([x[:, :, i::2, j::2] for i in range(2) for j in range(2)], 1)
        result: Tensor = self.reduction(self.norm(patches.permute(0, 2, 3, 1)))
        return result


def test_channel_with_several_numbers_in_a_norm_moves_all_of_them() -> None:
    model, sample = prepared(Merging()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    (channels,) = channel_structure(model, ("reduction",), sample).sets
    assert channels.vectors["first.bias"].shape == (6,)
    places = torch.arange(24).reshape(4, 6).T
    assert torch.equal(torch.from_numpy(channels.vectors["norm.weight"]), places)
    permuted = copy.deepcopy(model)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    permute_channels(permuted, [channels], {0: order})
    assert torch.equal(permuted.norm.weight[6:12], model.norm.weight[6:12][order])  # type: ignore[union-attr, index]
    torch.testing.assert_close(permuted(sample), model(sample))
    structure = channel_structure(model, ("reduction",), sample)
    assert without_rows(structure, ["first.weight"]).sets == []
    assert without_rows(structure, ["reduction.weight"]).sets == structure.sets


def test_channels_that_pass_an_unknown_operation_are_in_no_set() -> None:
    sets = by_kernel(list(structure_of(prepared(Opaque()), 8).sets))
    assert set(sets) == {"second.weight"}


class Bottleneck(nn.Module):
    """Inverted residual blocks with a shortcut, and an operation between the last kernels."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.expand, self.depth = nn.Conv2d(6, 10, 1), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.project = nn.Conv2d(10, 6, 1)
        self.operation, self.head = operation, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.norm(self.first(x))
        x = x + self.project(self.depth(self.expand(x).relu()).relu())
        logits: Tensor = self.head(self.operation(x).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("operation", "linear"),
    [
        (nn.Identity(), True),
        (nn.AvgPool2d(2), True),
        (nn.Dropout(), True),
        (nn.ReLU(), False),
        (nn.MaxPool2d(2), False),
        (nn.Sigmoid(), False),
        (nn.Conv2d(6, 6, 3, groups=6), False),
    ],
)
def test_channels_are_linear_if_only_sums_and_means_stand_between_kernels(
    operation: nn.Module, linear: bool
) -> None:
    sets = by_kernel(structure_of(Bottleneck(operation), 8).sets)
    assert sets["first.weight"].linear is linear and sets["project.weight"].linear is linear
    assert not sets["expand.weight"].linear


def test_networks_with_activations_after_every_kernel_have_no_linear_channels() -> None:
    assert not any(members.linear for members in structure_of(Mixed(), 16).sets if len(members.rows) > 1)
    assert not any(m.linear for m in structure_of(torchvision.models.resnet18(), 32).sets)
    assert sum(m.linear for m in structure_of(torchvision.models.mobilenet_v2(), 32).sets) == 7
