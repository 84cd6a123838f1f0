"""Files of networks whose names have no meaning, or another tensor's meaning."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Generator, Tensor

Tensors = dict[str, Tensor]
_SOURCES = ("embedding.weight", "positions.weight")
_BLOCK = re.compile(r"(blocks\.)([0-9]+)(\..*)")


def anonymous(tensors: Mapping[str, Tensor], seed: int = 0) -> Tensors:
    """Return the tensors with numbers in a random order as their names."""
    order = torch.randperm(len(tensors), generator=_generator(seed)).tolist()
    return {f"t{number}": tensor for number, tensor in zip(order, tensors.values(), strict=True)}


def exchanged(tensors: Mapping[str, Tensor], seed: int = 0) -> Tensors:
    """Return the tensors with exchanged names of equal shapes; all names of the network exist."""
    generator, shapes = _generator(seed), defaultdict(list)
    for name, tensor in tensors.items():
        shapes[tuple(tensor.shape)].append(name)
    result = dict(tensors)
    for names in shapes.values():
        order = torch.randperm(len(names), generator=generator).tolist()
        result |= {name: tensors[names[place]] for name, place in zip(names, order, strict=True)}
    return result


def renumbered(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors with the blocks in the opposite order."""
    matches = {name: _BLOCK.fullmatch(name) for name in tensors}
    last = max(int(match[2]) for match in matches.values() if match)
    return {
        f"{match[1]}{last - int(match[2])}{match[3]}" if match else name: tensors[name]
        for name, match in matches.items()
    }


def noisy(tensors: Mapping[str, Tensor], share: float = 0.1, seed: int = 0) -> Tensors:
    """Return matrices with noise of a share of their standard deviation; vectors and sources stay."""
    generator = _generator(seed)
    return {
        name: t + share * t.std() * torch.randn(t.shape, generator=generator)
        if t.dim() > 1 and name not in _SOURCES
        else t
        for name, t in tensors.items()
    }


def _generator(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)
