from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.models.attention_layers import preceding_norms
from mtlsign.models.norm_flow import norms_before_matrices
from tests.unit.models.swin_examples import timm_swin

INPUTS = torch.zeros(2, 4, 4, 6)


class Windows(nn.Module):
    """Linear layers after norms, with moved, padded and changed positions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(6), nn.LayerNorm(6)
        self.moved, self.changed = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.joined, self.both = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the last layer."""
        normal, further = self.norm(x), self.other(x)
        shifted = F.pad(torch.roll(normal, (-1, -1), (1, 2)), (0, 0, 0, 2, 0, 2))
        windows = shifted.view(2, 3, 2, 3, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6)
        moved = F.linear(windows, self.moved.weight, self.moved.bias)
        changed = self.changed(normal.clone().mul_(2))
        joined = self.joined(torch.cat([normal, normal], 1)) + self.both(torch.cat([normal, further], 1))
        result: Tensor = self.last(moved.mean() + changed.mean() + joined)
        return result


def test_norm_is_found_through_moved_and_padded_positions_only() -> None:
    model = Windows()
    assert norms_before_matrices(model, ("last",), INPUTS) == {
        "moved.weight": "norm",
        "joined.weight": "norm",
    }
    assert preceding_norms(model, ("last",), INPUTS) == {}  # no linear layer reads the norm itself
    assert not any(module._forward_hooks for module in model.modules())


def test_matrix_that_is_read_twice_has_the_norm_of_its_first_use() -> None:
    model = Windows()
    model.joined = model.moved
    assert norms_before_matrices(model, ("both",), INPUTS) == {"moved.weight": "norm"}
    model.joined = model.changed  # first used on changed outputs
    assert norms_before_matrices(model, ("both",), INPUTS) == {"moved.weight": "norm"}


def test_norms_before_windowed_attention_are_found_without_values() -> None:
    with torch.device("meta"):
        model = timm_swin()
        norms = norms_before_matrices(model, ("layers.1",), torch.zeros(2, 1, 24, 24))
    assert norms == {
        **{
            f"layers.{stage}.blocks.{block}.{matrix}.weight": f"layers.{stage}.blocks.{block}.{norm}"
            for stage in range(2)
            for block in range(2)
            for matrix, norm in (("attn.qkv", "norm1"), ("mlp.fc1", "norm2"))
        },
        "layers.1.downsample.reduction.weight": "layers.1.downsample.norm",
    }
