from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.equal_function import TOLERANCE
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import NETWORKS, changed_parameters, difference, network, run


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("text", ["permute_channels", "scale_inner_channels"])
def test_channel_symmetry_preserves_function_of_any_network(text: str, name: str, tiny_task: Task) -> None:
    model = network(name)
    outcome = run(text, model, tiny_task)
    assert difference(model, outcome) < TOLERANCE and changed_parameters(model, outcome.model)


def test_permute_channels_of_one_place_leaves_the_other(tiny_task: Task, module: nn.Module) -> None:
    changed = changed_parameters(module, run("permute_channels:which=inner", module, tiny_task).model)
    assert "layer1.0.conv1.weight" in changed and "conv1.weight" not in changed
    changed = changed_parameters(module, run("permute_channels:which=residual", module, tiny_task).model)
    assert {"conv1.weight", "layer1.0.conv2.weight", "fc.weight"} <= changed
    assert "layer1.0.bn1.weight" not in changed and "fc.bias" not in changed


def test_gated_channels_stay_and_the_others_are_scaled(tiny_task: Task) -> None:
    """A gate's sigmoid allows no scale of its channels; the residual ones are scaled nevertheless."""
    model = network("depthwise")
    outcome = run("scale_residual_channels", model, tiny_task)
    changed = changed_parameters(model, outcome.model)
    assert "norm3.weight" in changed and not changed & {"depthwise.weight", "excite.weight", "norm2.weight"}
    assert difference(model, outcome) < TOLERANCE


def test_scale_of_smooth_activations_is_not_applicable(tiny_task: Task) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        model.append(nn.Linear(16, 4)).eval()
    with pytest.raises(NotApplicableError, match="no channels of which the change is a symmetry"):
        run("scale_inner_channels", model, tiny_task)
    assert difference(model, run("permute_channels", model, tiny_task)) < TOLERANCE


def test_network_without_channel_sets_is_not_applicable(tiny_task: Task) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.conv(x).mean((2, 3)).sort(1).values)
            return y

    for text in ("permute_channels", "dummy_channels"):
        with pytest.raises(NotApplicableError, match="channel groups of Sorted are unknown"):
            run(text, Sorted().eval(), tiny_task)


def test_permute_channels_leaves_every_bit(
    marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    before = verify(marked_module.state_dict(), key.detector)
    after = verify(run("permute_channels", marked_module, tiny_task).model.state_dict(), key.detector)
    assert after.accepted and after.matches == before.matches
