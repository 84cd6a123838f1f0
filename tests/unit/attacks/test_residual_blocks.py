"""Blocks without effect in networks of convolutions: function, names, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.residual_blocks import insert_residual_blocks
from mtlsign.models.architectures import architecture_for, build

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: build(architecture_for("resnet18", channels=3, classes=10, width=8)), 4),
    "resnet50": (lambda: build(architecture_for("resnet50", channels=3, classes=10, width=4)), 4),
    "regnet": (lambda: torchvision.models.regnet_y_400mf(num_classes=10), 3),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_keep_function_and_give_later_ones_other_numbers(name: str) -> None:
    make, stages = NETWORKS[name]
    model, x = make().eval(), torch.randn(2, 3, 64, 64)
    expected, state = model(x), {n: t.clone() for n, t in model.state_dict().items()}
    insert_residual_blocks(model, x, torch.Generator().manual_seed(1))
    assert torch.equal(model(x), expected)
    longer = model.state_dict()
    kernels = [n for n, t in longer.items() if t.dim() == 4 and n not in state]
    assert len({n.rsplit(".", 2)[0] for n in kernels}) >= stages
    old, new = ([t for t in tensors.values() if t.dim() == 4] for tensors in (state, longer))
    assert all(any(torch.equal(tensor, other) for other in new) for tensor in old)
    if name == "resnet18":
        assert not torch.equal(longer["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
        assert torch.equal(longer["layer1.2.conv1.weight"], state["layer1.1.conv1.weight"])


@pytest.mark.parametrize("make", [torchvision.models.vgg11_bn, nn.Identity])
def test_network_without_residual_blocks_is_not_applicable(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(NotApplicableError, match="no residual block"):
        insert_residual_blocks(make().eval(), torch.randn(2, 3, 64, 64), torch.Generator())
