from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from mtlsign.models.batch_norms import batch_norm_values, is_batch_norm, replace_frozen_batch_norms
from mtlsign.models.taps import tapped_layers


class FrozenWithoutEps(nn.Module):
    """A frozen batch norm as the transformers library has it: ε is a constant of its forward pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def frozen_network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), FrozenWithoutEps(4), nn.ReLU(), nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4)
    )
    for buffer in model.buffers():
        buffer.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.SyncBatchNorm(3), True),
        (FrozenBatchNorm2d(3), True),
        (FrozenWithoutEps(3), True),
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), False),
        (nn.GroupNorm(1, 3), False),
        (nn.Conv2d(3, 3, 1), False),
    ],
)
def test_is_batch_norm_includes_frozen_ones(module: nn.Module, expected: bool) -> None:
    assert is_batch_norm(module) is expected


def test_batch_norm_values_of_norm_without_affine_are_ones_and_zeros() -> None:
    values = batch_norm_values(nn.BatchNorm2d(3, eps=0.25, affine=False))
    assert (values.gamma.tolist(), values.beta.tolist(), values.eps) == ([1] * 3, [0] * 3, 0.25)


def test_batch_norm_values_of_frozen_norm_are_its_buffers() -> None:
    module = FrozenWithoutEps(3)
    values = batch_norm_values(module)
    assert torch.equal(values.gamma, module.weight) and torch.equal(values.beta, module.bias)
    assert values.eps == 1e-5


def test_replace_frozen_batch_norms_keeps_function_and_tensor_names() -> None:
    model = frozen_network()
    x, names = torch.rand(2, 1, 9, 9), list(model.state_dict())
    before = model(x)
    replace_frozen_batch_norms(model)
    assert isinstance(model[1], nn.BatchNorm2d) and isinstance(model[4], nn.BatchNorm2d)
    assert sorted(model.state_dict()) == sorted(names)
    torch.testing.assert_close(model(x), before)


def test_tapped_layers_pair_convolutions_with_frozen_batch_norms() -> None:
    layers = tapped_layers(frozen_network(), ["4"], torch.rand(1, 1, 9, 9))
    assert [(layer.conv, layer.batch_norm) for layer in layers] == [("0", "1"), ("3", "4")]
