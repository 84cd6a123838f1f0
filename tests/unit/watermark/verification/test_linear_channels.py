"""Which linear channels a verifier considers, and the bound of the work for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from mtlsign.models.channel_sets import ChannelSet
from mtlsign.watermark.verification.alignment import Aligner
from mtlsign.watermark.verification.alignment.linear_channels import (
    MAX_MIXED_CHANNELS,
    linear_sets,
    mix_operations,
)
from mtlsign.watermark.verification.alignment.suspect import SuspectLayer, suspect_layers
from mtlsign.watermark.verification.reference import make_reference


def network(narrow: int = 6) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, 10, 3, bias=False), nn.BatchNorm2d(10), nn.ReLU()),
            *(nn.Conv2d(10, narrow, 1, bias=False), nn.BatchNorm2d(narrow)),
            *(nn.Conv2d(narrow, 40, 1, bias=False), nn.BatchNorm2d(40), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 3)),
        ).eval()


def suspect_of(model: nn.Sequential) -> tuple[Aligner, dict[str, SuspectLayer]]:
    sample = torch.zeros(2, 1, 12, 12)
    aligner = Aligner(model, ["10"], make_reference(model, ["10"], sample), sample)
    kernels = {
        name: p.detach().double().numpy() for name, p in model.named_parameters() if name in aligner.layers
    }
    return aligner, suspect_layers(kernels, aligner.layers, aligner.sets)


def test_linear_sets_are_those_between_two_kernels_without_activation() -> None:
    aligner, suspect = suspect_of(network())
    (mixed,) = linear_sets(suspect, aligner.sets)
    assert (mixed.size, [*mixed.writers], [*mixed.readers]) == (6, ["3.weight"], ["5.weight"])


def test_sets_with_fewer_projections_than_channels_are_left_out() -> None:
    aligner, suspect = suspect_of(network(38))
    assert [members.size for members in aligner.sets if members.linear] == [38]
    assert linear_sets(suspect, aligner.sets) == []


def test_sets_with_a_missing_kernel_or_with_further_channels_are_left_out() -> None:
    aligner, suspect = suspect_of(network())
    assert linear_sets({"3.weight": suspect["3.weight"]}, aligner.sets) == []
    wide = suspect["3.weight"]
    number = next(iter(wide.rows.places))
    side = replace(wide.rows, size=7, places={number: np.arange(7)})
    kernel = np.concatenate([wide.kernel, wide.kernel[:1]])
    assert linear_sets({**suspect, "3.weight": replace(wide, kernel=kernel, rows=side)}, aligner.sets) == []


def test_work_is_bounded_and_grows_with_the_kernels() -> None:
    def cost(size: int, rows: int) -> float:
        order = np.arange(size)
        members = ChannelSet(size, {"w": order}, {"r": order[:, None]}, linear=True)
        return mix_operations([members], {"w": (size, 64, 1, 1), "r": (rows, size, 1, 1)})

    assert 0 < cost(16, 64) < cost(16, 128) < cost(32, 128)
    assert cost(MAX_MIXED_CHANNELS + 1, 10_000) == 0, "such channels are not considered"
    assert cost(MAX_MIXED_CHANNELS, 6 * MAX_MIXED_CHANNELS) < 1e12
