"""Random permutation of the channels of a network, for tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mtlsign.models.channel_sets import ChannelSet


@torch.no_grad()
def permuted_copy(model: nn.Module, sets: Sequence[ChannelSet], seed: int = 0) -> nn.Module:
    """Return a copy whose channels are permuted within every set, with vectors and running statistics."""
    generator = np.random.default_rng(seed)
    changed = copy.deepcopy(model)
    tensors = dict(changed.named_parameters()) | dict(changed.named_buffers())
    blocks: dict[int, np.ndarray] = {}
    for number, members in enumerate(sets):
        partner = members.partner if members.partner is not None else number
        order_of_blocks = blocks.setdefault(min(number, partner), generator.permutation(members.blocks))
        width = members.size // members.blocks
        order = np.concatenate([b * width + generator.permutation(width) for b in order_of_blocks])
        for places in (members.rows, members.vectors):
            for name, index in places.items():
                tensors[name].data[torch.from_numpy(index)] = tensors[name].data[
                    torch.from_numpy(index[order])
                ]
        for name, index in members.columns.items():
            kernel = tensors[name].data
            groups = getattr(changed.get_submodule(name.rpartition(".")[0]), "groups", 1)
            if groups == 1:
                kernel[:, torch.from_numpy(index.flatten())] = kernel[
                    :, torch.from_numpy(index[order].flatten())
                ].clone()
                continue
            rows, columns = len(kernel) // groups, kernel.shape[1]
            source = kernel.clone()
            for block, other in enumerate(order_of_blocks):  # the rows of block `other` have not moved yet
                within = order[block * columns : (block + 1) * columns] - other * columns
                part = slice(other * rows, (other + 1) * rows)
                kernel[part] = source[part][:, torch.from_numpy(within)]
    return changed
