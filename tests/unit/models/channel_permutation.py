"""Random permutation of the channels of a network, for tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from mtlsign.models.channel_groups import permute_channels, random_orders
from mtlsign.models.channel_sets import ChannelSet


def permuted_copy(model: nn.Module, sets: Sequence[ChannelSet], seed: int = 0) -> nn.Module:
    """Return a copy whose channels are permuted within every set."""
    changed = copy.deepcopy(model)
    orders = random_orders(sets, lambda members: True, torch.Generator().manual_seed(seed))
    permute_channels(changed, sets, orders)
    return changed
