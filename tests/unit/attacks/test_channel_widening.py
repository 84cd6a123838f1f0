from __future__ import annotations

import torch
from torch import Tensor, nn

from mtlsign.attacks.channel_widening import FurtherChannels, WiderNetwork, can_be_widened
from mtlsign.attacks.equal_function import TOLERANCE
from mtlsign.models.channel_groups import network_channels
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import difference, network, run


class Concatenating(nn.Module):
    """A DenseNet-like network: a norm and a convolution read the joined outputs of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 4, 3)
        self.norm, self.conv, self.fc = nn.BatchNorm2d(7), nn.Conv2d(7, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu()
        logits: Tensor = self.fc(self.conv(joined).relu().mean((2, 3)))
        return logits


def test_channels_are_inserted_in_front_of_those_that_are_joined_after_them(tiny_task: Task) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Concatenating().eval()
        model.norm.running_mean.normal_()  # type: ignore[union-attr, operator]
    for text in ("dummy_channels:count=3", "split_channels:count=3,kind=random", "clique_channels:count=2"):
        outcome = run(text, model, tiny_task)
        count = 2 if "clique" in text else 3
        assert outcome.model.conv.in_channels == outcome.model.norm.num_features == 7 + 2 * count  # type: ignore[union-attr]
        assert difference(model, outcome) < TOLERANCE


def test_sets_are_widened_alone_and_model_stays() -> None:
    model = network("plain")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sets = network_channels(model, torch.zeros(2, 1, 24, 24)).sets
    generator = torch.Generator().manual_seed(0)
    wider = WiderNetwork(model)
    wider.add(
        sets[1], FurtherChannels([0, 0], "drawn", lambda c, s, g: torch.zeros_like(c[:, : len(s)])), generator
    )
    state = wider.finish().state_dict()
    assert state["3.weight"].shape == (10, 6, 3, 3) and state["7.weight"].shape == (10, 90)
    assert torch.equal(state["0.weight"], before["0.weight"])
    assert len(state["3.weight"].flatten(1).unique(dim=0)) == 9, "equal sources have equal rows"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_blocks_and_norms_over_channels_allow_no_further_channels() -> None:
    model = network("grouped")
    for channels in network_channels(model, torch.zeros(2, 1, 24, 24)).sets:
        assert can_be_widened(model, channels) == ("stem.weight" in channels.rows)
    normed = nn.Sequential(nn.Conv2d(1, 4, 24), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 4))
    (channels,) = network_channels(normed, torch.zeros(2, 1, 24, 24)).sets
    assert not can_be_widened(normed, channels)
