"""Wider copies of a network: its modules get the rows, columns and statistics of further channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mtlsign.attacks.training import trainable_copy
from mtlsign.models.batch_norms import is_batch_norm
from mtlsign.models.channel_groups import channel_axis, is_depthwise, owner_of, tensors_of
from mtlsign.models.channel_sets import ChannelSet, Indices


class ColumnRule(Protocol):
    """Function that gives the input columns of further channels."""

    def __call__(self, columns: Tensor, sources: Sequence[int], generator: Generator) -> Tensor:
        """Return the new columns [O, count, ...] and change `columns` [O, size, ...] in place.

        Args:
            columns: columns of the old channels.
            sources: old channel of each new one.
            generator: source of random numbers.
        """


@dataclass(frozen=True)
class FurtherChannels:
    """Channels that are added to one set.

    Attributes:
        sources: old channel from which each new one takes its numbers in vectors.
        rows: "copied" from the sources, or "drawn": random, and equal for equal sources.
        columns: rule for the columns.
    """

    sources: Sequence[int]
    rows: Literal["copied", "drawn"]
    columns: ColumnRule


class WiderNetwork:
    """Copy of a network to which further channels are added, one set at a time.

    Args:
        model: the network; unchanged.

    Attributes:
        model: the copy. It runs after `finish`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = trainable_copy(model)
        self._tensors = tensors_of(self.model)
        #: (name, dimension) -> (place in the old tensor, number of places that were put in front of it).
        self._insertions: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)

    @torch.no_grad()
    def add(self, channels: ChannelSet, further: FurtherChannels, generator: Generator) -> None:
        """Add channels to a set for which `can_be_widened` is true, and permute all channels of the set.

        Args:
            channels: the set, as it is in the network without further channels.
            further: the channels.
            generator: source of random numbers.
        """
        sources = torch.tensor(list(further.sources))
        order = torch.randperm(channels.size + len(sources), generator=generator)
        for name, places in channels.rows.items():
            part = self._part(name, 0, places)
            new = part[sources.to(part.device)]
            if further.rows == "drawn":
                distinct, numbers = sources.unique(return_inverse=True)
                drawn = torch.randn((len(distinct), *part.shape[1:]), generator=generator)
                new = drawn[numbers].to(part) * part.std()
            self._replace(name, 0, places, torch.cat([part, new])[order.to(part.device)])
        for name, places in channels.vectors.items():
            axis = channel_axis(self._tensors[name])
            part = self._part(name, axis, places).movedim(axis, 0)
            part = torch.cat([part, part[sources.to(part.device)]])[order.to(part.device)]
            self._replace(name, axis, places, part.movedim(0, axis))
        for name, places in channels.columns.items():
            part = self._part(name, 1, places)
            shape = (part.shape[0], channels.size, places.shape[1], *part.shape[2:])
            columns = part.reshape(shape).clone()
            new = further.columns(columns, further.sources, generator)
            columns = torch.cat([columns, new], 1)[:, order.to(part.device)]
            self._replace(name, 1, places, columns.reshape(part.shape[0], -1, *part.shape[2:]))

    def finish(self) -> nn.Module:
        """Put the tensors into the modules, whose numbers of channels then fit; return the network."""
        changed = {name for name, _ in self._insertions}
        for name in sorted(changed):
            module, leaf, tensor = owner_of(self.model, name), name.rpartition(".")[2], self._tensors[name]
            if leaf in module._parameters:
                setattr(module, leaf, nn.Parameter(tensor.contiguous()))
            else:
                setattr(module, leaf, tensor.contiguous())
        for module in {
            id(owner_of(self.model, name)): owner_of(self.model, name) for name in changed
        }.values():
            _fit_sizes(module)
        return self.model

    def _start(self, name: str, axis: int, places: Indices) -> int:
        first = int(places.reshape(-1)[0])
        return first + sum(count for place, count in self._insertions[name, axis] if place <= first)

    def _part(self, name: str, axis: int, places: Indices) -> Tensor:
        """Return the part of a tensor that belongs to the set's old channels."""
        return self._tensors[name].detach().narrow(axis, self._start(name, axis, places), places.size)

    def _replace(self, name: str, axis: int, places: Indices, part: Tensor) -> None:
        """Put a longer part in the place of the old one."""
        tensor, start = self._tensors[name].detach(), self._start(name, axis, places)
        end = start + places.size
        rest = tensor.narrow(axis, end, tensor.shape[axis] - end)
        self._tensors[name] = torch.cat([tensor.narrow(axis, 0, start), part, rest], axis)
        added = part.shape[axis] - places.size
        self._insertions[name, axis].append((int(places.reshape(-1)[-1]) + 1, added))


def can_be_widened(model: nn.Module, channels: ChannelSet) -> bool:
    """Return whether further channels of a set have a place in every tensor.

    The channels must be neighbours in each tensor. Grouped convolutions and norms over all channels allow
    no further ones.
    """
    kernels = [owner_of(model, name) for name in (*channels.rows, *channels.columns)]
    vectors = [owner_of(model, name) for name in channels.vectors]
    places = (*channels.rows.values(), *channels.columns.values(), *channels.vectors.values())
    return (
        channels.blocks == 1
        and len(channels.rows) > 0
        and all(isinstance(m, _ConvNd | nn.Linear) and not isinstance(m, _ConvTransposeNd) for m in kernels)
        and all(is_batch_norm(m) or not _is_norm(m) for m in vectors)
        and all(_is_run(numbers) for numbers in places)
    )


def _is_run(places: Indices) -> bool:
    flat = places.reshape(-1)
    return bool(np.array_equal(flat, np.arange(flat[0], flat[0] + len(flat))))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _fit_sizes(module: nn.Module) -> None:
    """Set the numbers of channels of a module to those of its tensors."""
    if isinstance(module, _ConvNd):
        if is_depthwise(module):
            module.groups = len(module.weight)
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _BatchNorm):
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        module.num_features = max(tensor.numel() for tensor in tensors)
