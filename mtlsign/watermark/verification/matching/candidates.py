"""Candidates for one layer of W0: tensors of a file whose shapes fit, as kernels with the layer's axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlsign.models.channel_sets import ChannelSet
from mtlsign.models.unnamed_tensors import FileTensor, axis_orders, in_axis_order, is_stored_as
from mtlsign.models.untrusted import MAX_GROWTH
from mtlsign.watermark.verification.alignment.layers import ReferenceLayer
from mtlsign.watermark.verification.alignment.suspect import Side, located_side

#: Pairs of tensors that are multiplied for one layer, and largest ratio of their rank to the layer's size.
MAX_PAIRS, MAX_RANK = 32, 4


@dataclass(frozen=True)
class Candidate:
    """Kernel that a file may hold for a layer.

    Attributes:
        places: places of the tensors that it is made of; each can be used once.
        kernel: float32 [O', I', ...], with W0's axes.
    """

    places: frozenset[int]
    kernel: Tensor


@dataclass(frozen=True)
class Slot:
    """Layer of W0, with the sizes that its kernel has in the suspect.

    Attributes:
        layer: W0's layer.
        columns: places of channels among the input columns.
        rows: number of rows; None if it is free, because no earlier layer has these channels.
    """

    layer: ReferenceLayer
    columns: Side
    rows: int | None

    @classmethod
    def of(cls, layer: ReferenceLayer, sets: Sequence[ChannelSet], sizes: Mapping[int, int]) -> Slot:
        """Return the slot of a layer.

        Args:
            layer: W0's layer.
            sets: channel sets.
            sizes: set -> the suspect's number of channels, as far as it is known.
        """
        all_sizes = _all_sizes(sets, sizes)
        columns = located_side(layer.column_sets, layer.column_channels, all_sizes, sets)
        rows = located_side(layer.row_sets, layer.row_channels, all_sizes, sets).size
        return cls(layer, columns, None if free_set(layer, sets, sizes) is not None else rows)

    def row_side(self, rows: int, sets: Sequence[ChannelSet], sizes: Mapping[int, int]) -> Side:
        """Return the places of channels among the rows of a kernel with so many rows."""
        layer, free = self.layer, free_set(self.layer, sets, sizes)
        known = dict(sizes) if free is None else {**sizes, free: rows}
        return located_side(layer.row_sets, layer.row_channels, _all_sizes(sets, known), sets)

    def candidates(self, tensors: Sequence[FileTensor]) -> Iterator[Candidate]:
        """Yield the kernels that the tensors can be, each in all orders of axes that fit."""
        layer = self.layer
        width = self.columns.size if layer.groups == 1 else layer.shape[1]
        if width < 1:
            return
        window = layer.shape[2:] if len(layer.shape) > 2 else ()
        inputs = width * layer.positions if len(layer.shape) == 2 else width
        fan_in = width * layer.positions
        for tensor in tensors:
            for values in tensor.variants:
                rows, rest = divmod(values.numel(), fan_in)
                if rest or not self._allows(rows):
                    continue
                shape = (rows, inputs, *window)
                for order in _distinct_orders(shape):
                    if is_stored_as(tuple(values.shape), shape, order):
                        yield Candidate(frozenset({tensor.place}), in_axis_order(values, shape, order))

    def products(self, tensors: Sequence[FileTensor]) -> Iterator[Candidate]:
        """Yield the kernels that two tensors make, which a file may hold as two layers.

        The second layer reads the r outputs of the first one; at each position axis at least one of them has
        length 1. Of many pairs those with the nearest names count.
        """
        if self.layer.groups != 1 or (self.layer.positions > 1 and len(self.layer.shape) == 2):
            return
        width, window = self.columns.size, self.layer.shape[2:]
        largest = MAX_RANK * min(self.layer.shape[0], width * self.layer.positions)
        firsts = [t for t in tensors if _windowed(t.values, window) and t.values.shape[1] == width]
        seconds = [t for t in tensors if _windowed(t.values, window) and self._allows(t.values.shape[0])]
        pairs = [
            (abs(first.place - second.place), first.place, first, second)
            for first in firsts
            for second in seconds
            if first.place != second.place
            and first.values.shape[0] == second.values.shape[1] <= largest
            and _joined_window(first.values, second.values) == tuple(window)
        ]
        pairs.sort(key=lambda pair: (pair[0], pair[1], pair[3].place))
        for _, _, first, second in pairs[:MAX_PAIRS]:
            places = frozenset({first.place, second.place})
            yield Candidate(places, _product(first.values, second.values, tuple(window)))

    def _allows(self, rows: int) -> bool:
        if self.rows is not None:
            return rows == self.rows
        return 1 <= rows <= MAX_GROWTH * self.layer.shape[0]


def free_set(layer: ReferenceLayer, sets: Sequence[ChannelSet], sizes: Mapping[int, int]) -> int | None:
    """Return the set of a layer's rows if a suspect can have any number of them, else None."""
    numbers = layer.sets_of_rows()
    if len(numbers) != 1 or numbers[0] in sizes or layer.groups != 1:
        return None
    members = sets[numbers[0]]
    return numbers[0] if members.blocks == 1 and members.size == layer.shape[0] else None


def _all_sizes(sets: Sequence[ChannelSet], sizes: Mapping[int, int]) -> list[int]:
    return [sizes.get(number, members.size) for number, members in enumerate(sets)]


def _distinct_orders(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the orders of axes that differ in axes longer than 1."""
    distinct: dict[tuple[int, ...], tuple[int, ...]] = {}
    for order in axis_orders(len(shape)):
        distinct.setdefault(tuple(axis for axis in order if shape[axis] > 1), order)
    return list(distinct.values())


def _windowed(values: Tensor, window: Sequence[int]) -> bool:
    """Return whether a tensor has rows, columns and positions; positions of 1 may be absent."""
    return values.dim() == 2 + len(window) or (values.dim() == 2 and len(window) == 2)


def _positions(values: Tensor) -> tuple[int, ...]:
    return tuple(values.shape[2:]) if values.dim() == 4 else (1, 1)


def _joined_window(first: Tensor, second: Tensor) -> tuple[int, ...] | None:
    """Return the window of two layers, one after the other; None if both have positions along one axis."""
    if first.dim() == second.dim() == 2:
        return ()
    sizes = list(zip(_positions(first), _positions(second), strict=True))
    return tuple(max(pair) for pair in sizes) if all(min(pair) == 1 for pair in sizes) else None


def _product(first: Tensor, second: Tensor, window: tuple[int, ...]) -> Tensor:
    """Return the kernel of two layers, one after the other, [O, I, ...]."""
    inner = first.reshape(*first.shape[:2], *_positions(first))
    outer = second.reshape(*second.shape[:2], *_positions(second))
    joined = torch.einsum("orcd,riab->oiacbd", outer, inner)
    return joined.reshape(len(outer), inner.shape[1], *window)
