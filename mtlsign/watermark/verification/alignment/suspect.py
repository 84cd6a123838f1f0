"""A suspect's kernels, prepared for alignment: where the channels of each set lie in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mtlsign.models.channel_sets import ChannelSet
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices
from mtlsign.watermark.verification.alignment.inputs import Square
from mtlsign.watermark.verification.alignment.layers import NO_SET, ReferenceLayer, unit_rows

#: Iterations that give rows and columns equal norms before channels are compared.
_EQUALIZING_ITERATIONS = 12


@dataclass(frozen=True)
class Side:
    """Places of channels among the rows or the input columns of a suspect's kernel.

    Attributes:
        size: number of rows or columns.
        places: set -> place of each of the suspect's channels of the set.
        fixed: place of each of W0's rows or columns that belongs to no set; any value elsewhere.
    """

    size: int
    places: Mapping[int, Indices]
    fixed: Indices


@dataclass(frozen=True)
class SuspectLayer:
    """Kernel of a suspect whose channels may be permuted, and more or fewer than W0's.

    Attributes:
        layer: W0's layer.
        kernel: float64 [O', I'/groups, positions].
        rows: places of channels among the rows.
        columns: places of channels among the input columns over all groups.
        kernels: of a product whose reader has one position: the reader [O', d'], and the flattened rows of
            the writer [d', I'·positions]; None for others.
        lacks_norm: whether it is a product without the values of its batch norm.
    """

    layer: ReferenceLayer
    kernel: Floats
    rows: Side
    columns: Side
    kernels: tuple[Floats, Floats] | None = None
    lacks_norm: bool = False

    @cached_property
    def scales(self) -> tuple[Floats, Floats]:
        """Multipliers of rows [O'] and columns [groups, I'/groups] that give them equal norms."""
        squares = np.square(self.kernel).sum(2).reshape(self.layer.groups, -1, self.kernel.shape[1])
        present = squares.sum(1) > 0
        target = np.where(present, squares.shape[1] / np.maximum(1, present.sum(1, keepdims=True)), 0.0)
        columns = np.ones_like(target)
        rows = np.ones(squares.shape[:2])
        for _ in range(_EQUALIZING_ITERATIONS):
            rows = _inverse((squares @ columns[:, :, None])[:, :, 0])
            columns = np.where(present, target * _inverse((rows[:, None, :] @ squares)[:, 0]), 1.0)
        rows = _inverse((squares @ columns[:, :, None])[:, :, 0])
        return np.sqrt(rows).reshape(-1), np.sqrt(columns)

    @property
    def scaled_columns(self) -> Floats:
        """Kernel whose columns have equal norms, [O', I'/groups, positions]."""
        blocks = self.kernel.reshape(self.layer.groups, -1, *self.kernel.shape[1:])
        scaled: Floats = (blocks * self.scales[1][:, None, :, None]).reshape(self.kernel.shape)
        return scaled


def _inverse(sums: Floats) -> Floats:
    """Return 1/x, and 1 for sums that are not positive."""
    inverse: Floats = 1 / np.where(sums > 0, sums, 1.0)
    return inverse


def suspect_layers(
    kernels: Mapping[str, Floats], layers: Mapping[str, ReferenceLayer], sets: Sequence[ChannelSet]
) -> dict[str, SuspectLayer]:
    """Locate the channels of every set in a suspect's kernels.

    The number of channels of a set is the one that most kernels agree on. A kernel of another size is left
    out.

    Args:
        kernels: float64 [O', I'/groups, ...] by name; some may be missing.
        layers: W0's layers.
        sets: channel sets.
    """
    flat = {
        name: kernel.reshape(kernel.shape[0], -1, layers[name].positions)
        for name, kernel in kernels.items()
        if kernel.size and kernel[0].size % layers[name].positions == 0
    }
    sizes = _set_sizes(flat, layers, sets)
    located = {}
    for name, kernel in flat.items():
        layer = layers[name]
        rows = located_side(layer.row_sets, layer.row_channels, sizes, sets)
        columns = located_side(layer.column_sets, layer.column_channels, sizes, sets)
        inputs = columns.size if layer.groups == 1 else layer.shape[1]
        if kernel.shape[:2] == (rows.size, inputs) and rows.size % layer.groups == 0:
            located[name] = SuspectLayer(layer, kernel, rows, columns)
    return located


def _set_sizes(
    kernels: Mapping[str, Floats], layers: Mapping[str, ReferenceLayer], sets: Sequence[ChannelSet]
) -> list[int]:
    """Return the suspect's number of channels of each set."""
    votes: list[Counter[int]] = [Counter() for _ in sets]
    for name, kernel in kernels.items():
        layer = layers[name]
        sides = [(layer.row_sets, layer.row_channels, kernel.shape[0])]
        if layer.groups == 1:
            sides.append((layer.column_sets, layer.column_channels, kernel.shape[1]))
        for numbers, channels, size in sides:
            number = int(numbers[0])
            if (
                number != NO_SET
                and _is_run(numbers, channels, number, sets)
                and len(numbers) == sets[number].size
            ):
                votes[number][size] += 1
    sizes = []
    for members, counts in zip(sets, votes, strict=True):
        most = max(counts.values(), default=0)
        winners = [size for size, count in counts.items() if count == most]
        fixed = members.blocks > 1 or not winners or members.size in winners
        sizes.append(members.size if fixed else min(winners))
    return sizes


def _is_run(numbers: Indices, channels: Indices, number: int, sets: Sequence[ChannelSet]) -> bool:
    """Return whether all channels of a set are neighbours in their order."""
    places = np.flatnonzero(numbers == number)
    size = sets[number].size
    return (
        len(places) == size
        and int(places[-1] - places[0]) == size - 1
        and np.array_equal(channels[places], np.arange(size))
    )


def located_side(
    numbers: Indices, channels: Indices, sizes: Sequence[int], sets: Sequence[ChannelSet]
) -> Side:
    """Locate the channels along one side of a kernel; a size of −1 if they cannot be located."""
    present = sorted({int(x) for x in numbers} - {NO_SET})
    runs = {number for number in present if _is_run(numbers, channels, number, sets)}
    changed = {number for number in present if sizes[number] != sets[number].size}
    fixed = np.arange(len(numbers))
    if not changed:
        places = {}
        for number in present:
            own = np.flatnonzero(numbers == number)
            places[number] = np.empty(len(own), dtype=np.int64)
            places[number][channels[own]] = own
        return Side(len(numbers), places, fixed)
    if changed - runs:
        return Side(-1, {}, fixed)
    widths = np.ones(len(numbers), dtype=np.int64)
    for number in changed:
        own = np.flatnonzero(numbers == number)
        widths[own] = 0
        widths[own[0]] = sizes[number]
    starts = np.cumsum(widths) - widths
    places = {}
    for number in present:
        own = np.flatnonzero(numbers == number)
        if number in changed:
            places[number] = starts[own[0]] + np.arange(sizes[number])
        else:
            places[number] = np.empty(len(own), dtype=np.int64)
            places[number][channels[own]] = starts[own]
    return Side(int(widths.sum()), places, starts)


def block_similarity(part: SuspectLayer, own: int, other: int, columns: Indices, square: Square) -> Floats:
    """Return the similarity of the rows of two blocks of a grouped convolution, [rows, rows'].

    Args:
        part: the convolution.
        own: number of W0's block.
        other: number of the suspect's block.
        columns: the suspect's column within the block for each of W0's.
        square: symmetry of the inputs.
    """
    layer = part.layer
    block = part.kernel.reshape(layer.groups, -1, *part.kernel.shape[1:])[other][:, columns]
    projection = layer.projection * layer.columns[own][:, None, None]
    block = block[:, :, square.order(layer.window)] * part.scales[1][other][columns][None, :, None]
    rows = unit_rows(block.reshape(len(block), -1) @ projection.reshape(-1, projection.shape[2]))
    directions = layer.directions.reshape(layer.groups, -1, rows.shape[1])[own]
    cosines: Floats = directions @ rows.T * layer.weighting
    return np.abs(cosines) if layer.free_signs else cosines
