from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mtlsign.models.activation_checkpointing import checkpointed, repeated_blocks
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.input_spec import TextSpec


class Stages(nn.Module):
    """Sequence of sequences, whose innermost elements with children are blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Sequential(_block(), _block()), nn.Sequential(_block()))
        self.top = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.top(self.stages(x).mean((2, 3)))
        return out


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.bn(self.conv(x)).relu())


def _block() -> nn.Module:
    return _Residual()


def trained(network: nn.Module, inputs: Tensor, *, checkpointing: bool) -> nn.Module:
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def train() -> None:
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            network(inputs).square().mean().backward()
            optimizer.step()

    if checkpointing:
        with checkpointed(network):
            train()
    else:
        train()
    return network


@pytest.mark.parametrize("name", ["stages", "resnet18", "transformer"])
def test_training_with_checkpointed_blocks_gives_the_same_values(name: str) -> None:
    torch.manual_seed(0)
    inputs = torch.rand(4, 6, 8, 8)
    if name == "stages":
        network: nn.Module = Stages()
    elif name == "resnet18":
        network = build(architecture_for("resnet18", channels=6, classes=3, width=4))
    else:
        spec = TextSpec(vocabulary=50, embedding=8, length=6, classes=2)
        network = build(architecture_for("transformer", width=8, **spec.architecture_fields))
        inputs = torch.arange(1, 13).reshape(2, 6)
    plain, repeated = (trained(network, inputs, checkpointing=on) for on in (False, True))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, repeated.state_dict()[name]), name


def test_checkpointed_blocks_keep_fewer_activations() -> None:
    network, inputs = Stages().train(), torch.rand(4, 6, 8, 8)

    def saved() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            network(inputs)
        return sum(sizes)

    plain = saved()
    with checkpointed(network):
        assert saved() < plain / 2
    with checkpointed(network, enabled=False):
        assert saved() == plain
    assert saved() == plain


def test_copy_of_checkpointed_network_runs_its_own_blocks() -> None:
    network, inputs = Stages().eval(), torch.rand(2, 6, 8, 8)
    with checkpointed(network):
        twin = copy.deepcopy(network)
        nn.init.zeros_(twin.stages[0][0].conv.weight)
        assert not torch.equal(twin(inputs), network(inputs))
        twin(inputs).sum().backward()
    assert twin.stages[0][0].conv.weight.grad is not None
    assert all("forward" not in vars(block) for block in repeated_blocks(network).values())


def test_repeated_blocks_of_known_networks() -> None:
    assert list(repeated_blocks(Stages())) == ["stages.0.0", "stages.0.1", "stages.1.0"]
    resnet = build(architecture_for("resnet18", channels=1, classes=3, width=4))
    names = list(repeated_blocks(resnet))
    assert len(names) == 8 and names[0] == "layer1.0"
    assert not repeated_blocks(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
