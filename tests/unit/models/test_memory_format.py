from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.models import architectures
from mtlsign.models.memory_format import memory_format_for


@pytest.mark.parametrize(
    ("width", "expected"),
    [(4, torch.contiguous_format), (12, torch.contiguous_format), (8, torch.channels_last)],
)
def test_memory_format_of_resnet_depends_on_width(width: int, expected: torch.memory_format) -> None:
    """Strided 1x1 convolutions with 4 or 12 input channels corrupt memory in channels-last on AVX2."""
    fields = architectures.architecture_for("resnet18", channels=1, classes=4, width=width, stem="stock")
    assert memory_format_for(architectures.build(fields)) is expected


def test_memory_format_without_strided_pointwise_convolution_is_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(5, 7, 1))
    assert memory_format_for(model) is torch.channels_last


def test_memory_format_counts_channels_of_a_group() -> None:
    grouped = nn.Conv2d(16, 16, 1, stride=2, groups=4)
    assert memory_format_for(nn.Sequential(grouped)) is torch.contiguous_format
