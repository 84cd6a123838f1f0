"""Linear channels of a suspect that were mixed: found in its kernels, undone, and put in W0's order.

The channels between two linear sets, such as the expanded ones of an inverted residual block, can only be
permuted and scaled. Their order comes from the kernels that a mix does not change, then from those in which
it is undone. With a better order the mix is estimated again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtlsign.models.channel_sets import ChannelSet
from mtlsign.watermark.verification.alignment.linear_fit import (
    UndoneMix,
    WrittenKernel,
    estimate_operations,
    undone_mix,
)
from mtlsign.watermark.verification.alignment.orders import Orders
from mtlsign.watermark.verification.alignment.search import Search
from mtlsign.watermark.verification.alignment.suspect import SuspectLayer
from mtlsign.watermark.verification.sketches import sketch_size

#: More linear channels of one set are not considered, because the work grows with their third power.
MAX_MIXED_CHANNELS = 256
#: Least number of projections in all sketches of a set, for each channel.
_MIN_PROJECTIONS = 1.0
#: Most estimates of a mix: at first one set after another, then all sets together.
_FIRST_ESTIMATES, _ESTIMATES = 4, 8
#: Rounds of the search after each estimate and after the last one.
_SEARCH_ROUNDS, _LAST_ROUNDS = 1, 6

Layers = Mapping[str, SuspectLayer]


@dataclass(frozen=True)
class LinearSet:
    """Linear channels of a suspect.

    Attributes:
        number: of the channel set.
        size: number of channels.
        writers: names of the kernels that write them.
        readers: names of the kernels that read them.
        described: names of the readers with one position and sketches of one size.
    """

    number: int
    size: int
    writers: Sequence[str]
    readers: Sequence[str]
    described: Sequence[str]

    @property
    def kernels(self) -> Sequence[str]:
        """Names of the kernels that write or read the channels."""
        return (*self.writers, *self.readers)


def linear_sets(suspect: Layers, sets: Sequence[ChannelSet]) -> list[LinearSet]:
    """Return the linear channels whose mix the sketches determine, in execution order.

    Args:
        suspect: its layers; a set with a missing kernel, or with another number of channels than in W0, is
            left out, and so is one with more channels than `MAX_MIXED_CHANNELS` or than projections.
        sets: channel sets of the architecture.
    """
    mixable = []
    for number, members in enumerate(sets):
        names = [*members.rows, *members.columns]
        if not (members.linear and 1 < members.size <= MAX_MIXED_CHANNELS and suspect.keys() >= set(names)):
            continue
        sides = [suspect[n].rows for n in members.rows] + [suspect[n].columns for n in members.columns]
        if any(side.size != members.size or len(side.places[number]) != members.size for side in sides):
            continue
        pointwise = [n for n in members.columns if suspect[n].layer.positions == 1]
        size = suspect[pointwise[0]].layer.sketch.shape[1] if pointwise else 0
        described = [n for n in pointwise if suspect[n].layer.sketch.shape[1] == size]
        projections = size + sum(suspect[n].layer.sketch.shape[1] for n in members.rows)
        rows = sum(len(suspect[n].layer.sketch) for n in described)
        if described and rows > members.size and projections > _MIN_PROJECTIONS * members.size:
            mixable.append(LinearSet(number, members.size, [*members.rows], [*members.columns], described))
    return mixable


def mix_operations(sets: Sequence[ChannelSet], shapes: Mapping[str, Sequence[int]]) -> float:
    """Return a bound of the operations of all estimates of mixes.

    Args:
        sets: channel sets of the architecture.
        shapes: shape of each kernel by name.
    """
    operations = 0.0
    for members in sets:
        if members.linear and members.size <= MAX_MIXED_CHANNELS:
            rows = sum(shapes[name][0] for name in members.columns)
            columns = [int(np.prod(shapes[name][1:])) for name in members.rows]
            size = max(sketch_size(fan_in) for fan_in in (members.size, *columns))
            operations += estimate_operations(members.size, rows, sum(columns), size)
    # Two starts, of all sets and then of those that were mixed.
    return 4 * (_FIRST_ESTIMATES + _ESTIMATES - 1) * operations


class UnmixedSearch:
    """Search for the order of the channels of one suspect, with estimates of the mixes of its linear ones.

    Args:
        suspect: the suspect's layers.
        sets: channel sets of the architecture.
        mixed: result of `linear_sets`.
        search: returns a search over given layers from given orders, which it changes.
    """

    def __init__(
        self,
        suspect: Layers,
        sets: Sequence[ChannelSet],
        mixed: Sequence[LinearSet],
        search: Callable[[Layers, Orders], Search],
    ) -> None:
        self._suspect, self._sets, self._mixed, self._search = suspect, sets, mixed, search
        self._touched = {name for own in mixed for name in own.kernels}

    @property
    def unchanged(self) -> Layers:
        """Layers that a mix does not change."""
        return {name: part for name, part in self._suspect.items() if name not in self._touched}

    def run(self, orders: Orders) -> tuple[Layers, Search]:
        """Return the layers without mixes and their search, with the largest similarity of all estimates.

        Args:
            orders: first order; it is changed.

        Raises:
            numpy.linalg.LinAlgError: the kernels determine no mix.
        """
        results: list[tuple[float, Layers, Search]] = []
        current = self._first_estimates(orders)
        for number in range(_ESTIMATES):
            if number:
                current = self._estimates(orders)
            before = {key: order.copy() for key, order in orders.channels.items()}
            own = replace(orders, channels=dict(orders.channels), signs=dict(orders.signs))
            search = self._search(current, own)
            search.run(_SEARCH_ROUNDS if number + 1 < _ESTIMATES else _LAST_ROUNDS)
            results.append((search.similarity(), current, search))
            orders.channels = dict(own.channels)
            for mixed in self._mixed:
                orders.channels[mixed.number] = np.arange(mixed.size)
            if all(np.array_equal(order, orders.channels[key]) for key, order in before.items()):
                break
        _, layers, search = max(results, key=lambda result: result[0])
        return layers, search

    def _estimates(self, orders: Orders) -> Layers:
        """Return all layers without mixes, under given orders."""
        search, layers = self._search(self._suspect, orders), dict(self._suspect)
        for mixed in self._mixed:
            self._undo(mixed, search, layers)
        return layers

    def _first_estimates(self, orders: Orders) -> Layers:
        """Return all layers without mixes; every estimate gives a better order for the next one."""
        for mixed in self._mixed:
            orders.channels[mixed.number] = np.arange(mixed.size)
        search, known = self._search(self._suspect, orders), dict(self.unchanged)
        for mixed in self._mixed:
            earlier = {name: known.get(name, self._suspect[name]) for name in mixed.kernels}
            for _ in range(_FIRST_ESTIMATES - 1):
                known |= earlier
                self._undo(mixed, search, known)
                partial = self._search(known, orders)
                partial.find_all_signs()
                for number in self._neighbours(mixed):
                    partial.update(number)
            known |= earlier
            self._undo(mixed, search, known)
        return {name: known.get(name, part) for name, part in self._suspect.items()}

    def _neighbours(self, mixed: LinearSet) -> list[int]:
        """Return the other sets of channels in the kernels that write or read the mixed ones."""
        linear = {own.number for own in self._mixed}
        parts = [self._suspect[name] for name in mixed.kernels]
        near = {number for part in parts for number in (*part.rows.places, *part.columns.places)}
        return sorted(near - linear)

    def _undo(self, mixed: LinearSet, search: Search, layers: dict[str, SuspectLayer]) -> None:
        """Undo the mix of one set in all kernels that write or read it, in place."""
        undone = self._fitted(mixed, search)
        for name, matrix in zip(mixed.writers, undone.writers, strict=True):
            part = layers[name]
            places = part.rows.places[mixed.number]
            kernel = part.kernel.copy()
            kernel[places] = np.tensordot(matrix, part.kernel[places], 1)
            layers[name] = replace(part, kernel=kernel)
        for name in mixed.readers:
            part = layers[name]
            places = part.columns.places[mixed.number]
            kernel = part.kernel.copy()
            kernel[:, places] = np.einsum("ock,cd->odk", part.kernel[:, places], undone.reader, optimize=True)
            layers[name] = replace(part, kernel=kernel)

    def _fitted(self, mixed: LinearSet, search: Search) -> UndoneMix:
        """Estimate the mix of one set from the suspect's own kernels."""
        readers = [self._suspect[name] for name in mixed.described]
        first = readers[0].layer
        projection = np.empty((mixed.size, first.projection.shape[2]))
        projection[first.column_channels] = first.projection[:, 0]
        rows = [search.ordered_rows(part)[:, part.columns.places[mixed.number], 0] for part in readers]
        return undone_mix(
            np.concatenate(rows),
            np.concatenate([part.layer.directions for part in readers]),
            projection,
            [self._written(self._suspect[name], mixed, search) for name in mixed.writers],
        )

    def _written(self, part: SuspectLayer, mixed: LinearSet, search: Search) -> WrittenKernel:
        layer = part.layer
        directions = np.empty_like(layer.directions)
        directions[layer.row_channels] = layer.directions
        kernel = search.ordered_columns(part)[part.rows.places[mixed.number]]
        return WrittenKernel(kernel, layer.columns[0], layer.projection, directions)
