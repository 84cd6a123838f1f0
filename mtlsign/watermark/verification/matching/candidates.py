"""Candidates for one layer of W0: tensors of a file whose shapes fit, as kernels with the layer's axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mtlsign.models.channel_sets import ChannelSet
from mtlsign.models.unnamed_tensors import FileTensor, axis_orders, in_axis_order, is_stored_as
from mtlsign.models.untrusted import MAX_GROWTH
from mtlsign.watermark.verification.alignment.layers import ReferenceLayer
from mtlsign.watermark.verification.alignment.suspect import Side, located_side
from mtlsign.watermark.verification.matching.composed import ComposedShape, composed_kernel

#: Largest ratio of the rank of two layers to the size of the kernel that they make.
MAX_RANK = 4
#: Multiplications of a product of matrices that take the time of one other.
_MATRIX_SPEED = 32


class Work(Protocol):
    """Limit of a computation."""

    def use(self, count: int) -> None:
        """Subtract multiplications. Raises `ModelError` if none are left."""


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

    def products(self, tensors: Sequence[FileTensor], work: Work) -> Iterator[Candidate]:
        """Yield the kernels that two tensors make, which a file may hold as two layers.

        The second layer reads the r outputs of the first one; at each position axis at least one of them has
        length 1. Of many pairs those with the nearest names count.

        Args:
            tensors: of the file, those in use left out.
            work: limit of the multiplications.
        """
        if self.layer.groups != 1 or (self.layer.positions > 1 and len(self.layer.shape) == 2):
            return
        width, window = self.columns.size, tuple(self.layer.shape[2:])
        largest = MAX_RANK * min(self.layer.shape[0], width * self.layer.positions)
        for first, second in ComposedShape(width, self._allows, window, largest).pairs(tensors):
            work.use(len(second.values) * first.values.numel() * second.values[0, 0].numel() // _MATRIX_SPEED)
            kernel = composed_kernel(first.values, second.values, window)
            yield Candidate(frozenset({first.place, second.place}), kernel)

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
