from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mtlsign.watermark.verification import bounded_convolutions
from mtlsign.watermark.verification.bounded_convolutions import bound_convolutions

CONVOLUTIONS = {
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 7, stride=2, padding=3, bias=False),
    "grouped": nn.Conv2d(4, 8, 3, groups=2, padding="same"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_in_parts_gives_the_same_bits(
    name: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(copy.deepcopy(CONVOLUTIONS[name])).double()
    inputs = torch.rand(9, 4, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if channels_last:
        inputs, network = (
            inputs.to(memory_format=torch.channels_last),
            network.to(memory_format=torch.channels_last),
        )
    with torch.no_grad():
        whole = network(inputs)
        sizes: list[int] = []
        forward = nn.Conv2d._conv_forward
        monkeypatch.setattr(
            nn.Conv2d, "_conv_forward", lambda *args: (sizes.append(len(args[1])), forward(*args))[1]
        )
        monkeypatch.setattr(bounded_convolutions, "MAX_MATRIX_NUMBERS", 12_000)
        bound_convolutions(network)
        parts = network(inputs)
    assert torch.equal(parts, whole) and parts.stride() == whole.stride()
    assert len(sizes) > 1 and sum(sizes) == 9


def test_convolution_with_gradients_or_float32_is_computed_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounded_convolutions, "MAX_MATRIX_NUMBERS", 1)
    sizes: list[int] = []
    forward = nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda *args: (sizes.append(len(args[1])), forward(*args))[1]
    )
    network = nn.Sequential(nn.Conv2d(2, 3, 3))
    bound_convolutions(network)
    with torch.no_grad():
        network(torch.rand(5, 2, 6, 6))
    network.double()(torch.rand(5, 2, 6, 6, dtype=torch.float64)).sum().backward()
    assert sizes == [5, 5] and network[0].weight.grad is not None
