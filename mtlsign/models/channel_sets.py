"""Sets of channels that can change places without changing the function of a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from mtlsign.models.channel_flow import trace_channels
from mtlsign.models.channel_labels import ChannelLabels

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChannelSet:
    """Channels that play the same part in the network.

    Attributes:
        size: number of channels.
        rows: kernel name -> index of each channel's row, [size].
        columns: kernel name -> indices of each channel's input columns, [size, r]; r is above 1 where
            positions were flattened. Columns of a grouped convolution are counted over all its groups.
        vectors: name -> index of each channel's number in a vector parameter or buffer, [size]; [size, r] if
            a channel has several, as in a norm over the channels of neighbouring positions.
        blocks: number of blocks of neighbouring channels that stay together, because a grouped convolution
            reads or writes them.
        partner: index of the set whose blocks change places in the same way; None without one.
        linear: whether only copies, sums and means over positions stand between the kernels that write and
            read the channels, and every one of these kernels reads or writes all of them.
    """

    size: int
    rows: Mapping[str, Indices]
    columns: Mapping[str, Indices]
    vectors: Mapping[str, Indices] = field(default_factory=dict)
    blocks: int = 1
    partner: int | None = None
    linear: bool = False


@dataclass(frozen=True)
class ChannelStructure:
    """Channels of a network.

    Attributes:
        sets: channel sets in execution order. Channels that pass an operation of unknown effect are in none.
        input_kernels: names of the kernels whose input columns are the channels of the network's inputs.
    """

    sets: Sequence[ChannelSet]
    input_kernels: frozenset[str]


def channel_structure(model: nn.Module, taps: Sequence[str], sample: Tensor) -> ChannelStructure:
    """Return the channels of a network up to its last tap.

    Args:
        model: the network, in any mode; its values have no influence.
        taps: module names.
        sample: one batch [n, C, H, W]; only its shape matters.

    Raises:
        ModelError: a tap does not exist, or is not reached.
    """
    labels = trace_channels(model, taps, sample)
    channels = _channels(labels)
    _fix_outputs(labels, channels)
    blocks = _blocks(labels)
    members: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for label, uses in channels.items():
        if label not in labels.fixed and (uses.rows or uses.columns):
            signature = (
                tuple((name, len(places)) for name, places in uses.rows.items()),
                tuple((name, len(places)) for name, places in uses.columns.items()),
                tuple((name, len(places)) for name, places in uses.vectors.items()),
            )
            members[signature].append(label)
    sets = [_channel_set(group, channels) for group in members.values()]
    sets = [
        replace(own, linear=_is_linear(own, group, labels))
        for own, group in zip(sets, members.values(), strict=True)
    ]
    inputs = list(range(sample.shape[1]))
    return ChannelStructure(
        sets=_with_blocks(sets, list(members.values()), blocks),
        input_kernels=frozenset(n for n, k in labels.kernels.items() if k.columns.tolist() == inputs),
    )


def without_rows(structure: ChannelStructure, kernels: Collection[str]) -> ChannelStructure:
    """Return the channels of a network without the sets that have rows in one of the kernels.

    Args:
        structure: the channels.
        kernels: names of kernels.
    """
    remaining = [index for index, own in enumerate(structure.sets) if not own.rows.keys() & set(kernels)]
    places = {index: place for place, index in enumerate(remaining)}
    sets = [structure.sets[index] for index in remaining]
    partners = [None if own.partner is None else places.get(own.partner) for own in sets]
    pairs = zip(sets, partners, strict=True)
    return replace(structure, sets=[replace(own, partner=partner) for own, partner in pairs])


@dataclass
class _Uses:
    """Places of one channel: indices by kernel or vector name."""

    rows: dict[str, list[int]] = field(default_factory=dict)
    columns: dict[str, list[int]] = field(default_factory=dict)
    vectors: dict[str, list[int]] = field(default_factory=dict)


def _channels(labels: ChannelLabels) -> dict[int, _Uses]:
    channels: dict[int, _Uses] = defaultdict(_Uses)
    for name, kernel in labels.kernels.items():
        for index, label in enumerate(kernel.rows.tolist()):
            channels[label].rows.setdefault(name, []).append(index)
        if not _is_depthwise(kernel.groups, len(kernel.columns), len(kernel.rows)):
            for index, label in enumerate(kernel.columns.tolist()):
                channels[label].columns.setdefault(name, []).append(index)
    for name, vector in labels.vectors.items():
        for index, label in enumerate(vector.tolist()):
            channels[label].vectors.setdefault(name, []).append(index)
    return channels


def _is_depthwise(groups: int, inputs: int, rows: int) -> bool:
    return groups > 1 and groups == inputs == rows


def _fix_outputs(labels: ChannelLabels, channels: Mapping[int, _Uses]) -> None:
    """Fix channels that no kernel reads, such as the outputs, and those with several rows in one kernel."""
    for label, uses in channels.items():
        if not uses.columns or any(len(places) > 1 for places in uses.rows.values()):
            labels.fixed.add(label)


def _blocks(labels: ChannelLabels) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Return the blocks of input and output labels of every grouped convolution that is not depthwise."""
    blocks = []
    for kernel in labels.kernels.values():
        if kernel.groups > 1 and not _is_depthwise(kernel.groups, len(kernel.columns), len(kernel.rows)):
            pair = tuple(
                [part.tolist() for part in side.chunk(kernel.groups)]
                for side in (kernel.columns, kernel.rows)
            )
            blocks.append((pair[0], pair[1]))
    return blocks


def _channel_set(group: Sequence[int], channels: Mapping[int, _Uses]) -> ChannelSet:
    first = channels[group[0]]

    def places(kind: str, name: str) -> Indices:
        return np.array([getattr(channels[label], kind)[name] for label in group], dtype=np.int64)

    return ChannelSet(
        size=len(group),
        rows={name: places("rows", name)[:, 0] for name in first.rows},
        columns={name: places("columns", name) for name in first.columns},
        vectors={
            name: places("vectors", name).squeeze(1) if len(own) == 1 else places("vectors", name)
            for name, own in first.vectors.items()
        },
    )


def _is_linear(channels: ChannelSet, group: Sequence[int], labels: ChannelLabels) -> bool:
    """Return whether a mix of the channels can be undone where they are read."""
    kernels = labels.kernels
    return (
        not labels.nonlinear & set(group)
        and all(len(kernels[name].rows) == channels.size for name in channels.rows)
        and all(len(kernels[name].columns) == channels.size for name in channels.columns)
    )


def _with_blocks(
    sets: list[ChannelSet],
    members: Sequence[Sequence[int]],
    blocks: Sequence[tuple[list[list[int]], list[list[int]]]],
) -> list[ChannelSet]:
    """Give sets their blocks; remove sets whose blocks are no runs of neighbouring channels."""
    places = {label: (index, k) for index, group in enumerate(members) for k, label in enumerate(group)}
    removed: set[int] = set()
    linked: dict[int, tuple[int, int | None]] = {}
    for inputs, outputs in blocks:
        sides = [_set_of_blocks(side, members, places) for side in (inputs, outputs)]
        touched = {places[x][0] for side in (inputs, outputs) for block in side for x in block if x in places}
        first, second = sides
        if first is None or second is None or first == second or touched & (removed | set(linked)):
            removed |= touched
            for index in touched & set(linked):
                removed |= {other for other in (linked[index][1],) if other is not None}
            continue
        linked[first], linked[second] = (len(inputs), second), (len(inputs), first)
    remaining = [index for index in range(len(sets)) if index not in removed]
    position = {index: k for k, index in enumerate(remaining)}
    result = []
    for index in remaining:
        count, partner = linked.get(index, (1, None))
        other = position.get(partner) if partner is not None else None
        result.append(replace(sets[index], blocks=count, partner=other))
    return result


def _set_of_blocks(
    blocks: Sequence[Sequence[int]],
    members: Sequence[Sequence[int]],
    places: Mapping[int, tuple[int, int]],
) -> int | None:
    """Return the set whose channels are exactly these blocks in order; None if there is none."""
    labels = [label for block in blocks for label in block]
    index = places.get(labels[0], (None, 0))[0]
    return index if index is not None and list(members[index]) == labels else None
