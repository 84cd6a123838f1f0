"""Kernels that a file holds as two tensors: two layers in a row, whose product they are.

A hostile file can have thousands of tensors that fit. Those with the nearest names are combined, and no list
of all combinations is made.
"""

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlsign.models.unnamed_tensors import FileTensor

#: Pairs of tensors that are multiplied for one layer.
MAX_PAIRS = 32


@dataclass(frozen=True)
class ComposedShape:
    """Kernel that two tensors can make.

    Attributes:
        inputs: number of its input channels.
        allows_rows: whether it can have so many rows.
        window: its positions; () for a matrix.
        largest_rank: most channels between the two layers.
    """

    inputs: int
    allows_rows: Callable[[int], bool]
    window: tuple[int, ...]
    largest_rank: int

    def pairs(self, tensors: Sequence[FileTensor]) -> list[tuple[FileTensor, FileTensor]]:
        """Return the pairs with the nearest names whose product has the shape, at most `MAX_PAIRS`.

        Args:
            tensors: of the file, in the order of their places.
        """
        seconds = self._seconds(tensors)
        # The largest key is on top: numbers are negative.
        nearest: list[tuple[tuple[int, int, int, int], tuple[FileTensor, FileTensor]]] = []
        for number, first in enumerate(tensors):
            if not self._is_layer(first.values) or first.values.shape[1] != self.inputs:
                continue
            for group in seconds.get(len(first.values), {}).values():
                for second in group.outward(first.place) if self._joins(first, group.tensors[0]) else ():
                    key = (-abs(first.place - second.place), -first.place, -second.place, -number)
                    if second.place == first.place:
                        continue
                    if len(nearest) < MAX_PAIRS:
                        heapq.heappush(nearest, (key, (first, second)))
                    elif key > nearest[0][0]:
                        heapq.heapreplace(nearest, (key, (first, second)))
                    else:
                        break
        return [pair for _, pair in sorted(nearest, key=lambda entry: entry[0], reverse=True)]

    def _is_layer(self, values: Tensor) -> bool:
        """Return whether a tensor has rows, columns and positions; positions of 1 may be absent."""
        if values.dim() == 2:
            return len(self.window) in (0, 2)
        return values.dim() == 2 + len(self.window) and all(
            size in (1, own) for size, own in zip(values.shape[2:], self.window, strict=True)
        )

    def _seconds(self, tensors: Sequence[FileTensor]) -> dict[int, dict[tuple[int, ...], _Group]]:
        """Return the tensors that can be the second layer by their columns, and then by their positions."""
        groups: dict[int, dict[tuple[int, ...], _Group]] = defaultdict(dict)
        for tensor in tensors:
            values = tensor.values
            if not self._is_layer(values) or values.shape[1] > self.largest_rank:
                continue
            if self.allows_rows(len(values)):
                sizes = groups[values.shape[1]]
                sizes.setdefault(tuple(values.shape[2:]), _Group()).append(tensor)
        return groups

    def _joins(self, first: FileTensor, second: FileTensor) -> bool:
        """Return whether two layers have the window; along each axis one has positions at most."""
        if first.values.dim() == second.values.dim() == 2:
            return not self.window
        sizes = list(zip(_positions(first.values), _positions(second.values), strict=True))
        return all(min(pair) == 1 for pair in sizes) and tuple(map(max, sizes)) == self.window


class _Group:
    """Tensors of one shape in the order of their places."""

    def __init__(self) -> None:
        self.tensors: list[FileTensor] = []
        self._places: list[int] = []

    def append(self, tensor: FileTensor) -> None:
        self.tensors.append(tensor)
        self._places.append(tensor.place)

    def outward(self, place: int) -> Iterator[FileTensor]:
        """Yield the tensors from the nearest place on; of equal distances the earlier place comes first."""
        right = bisect.bisect_left(self._places, place)
        left = right - 1
        while left >= 0 or right < len(self.tensors):
            if right == len(self.tensors):
                is_before = True
            else:
                is_before = left >= 0 and place - self._places[left] <= self._places[right] - place
            yield self.tensors[left if is_before else right]
            left, right = (left - 1, right) if is_before else (left, right + 1)


def composed_kernel(first: Tensor, second: Tensor, window: tuple[int, ...]) -> Tensor:
    """Return the kernel of two layers, one after the other, [O, I, ...].

    Args:
        first: kernel of the first layer, [r, I, ...].
        second: kernel of the second layer, [O, r, ...]; at each position axis one of both has length 1.
        window: positions of the result; () for matrices.
    """
    inner = first.reshape(*first.shape[:2], *_positions(first))
    outer = second.reshape(*second.shape[:2], *_positions(second))
    joined = torch.einsum("orcd,riab->oiacbd", outer, inner)
    return joined.reshape(len(outer), inner.shape[1], *window)


def _positions(values: Tensor) -> tuple[int, ...]:
    return tuple(values.shape[2:]) if values.dim() == 4 else (1, 1)
