"""Search for a network's kernels among the tensors of a file: one layer after another, by sketches.

In execution order the channels that a layer reads are in a known order when its turn comes. The sketch of
each candidate's rows can therefore be compared with that of W0's rows, and the best candidate gives the order
of the channels that the layer writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mtlsign.errors import ModelError
from mtlsign.models.channel_sets import ChannelSet
from mtlsign.models.unnamed_tensors import FileTensor
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices
from mtlsign.watermark.verification.alignment.layers import ReferenceLayer
from mtlsign.watermark.verification.alignment.orders import Orders
from mtlsign.watermark.verification.alignment.result import random_sketch
from mtlsign.watermark.verification.matching.candidates import Candidate, Slot, free_set
from mtlsign.watermark.verification.matching.row_sketches import (
    assigned_rows,
    ordered_projection,
    projected_rows,
    upper_bound,
)

#: Candidates of a layer that are compared by an assignment of all rows.
_FINALISTS = 4
#: Standard deviations of a mean cosine with random kernels, by which a layer's own must exceed it.
#: Fewer where the order of the rows is free: the best order makes any two kernels alike.
_DEVIATIONS, _FREE_DEVIATIONS = 2.0, 0.5
#: Difference of cosines below which the next layer decides.
_NEAR = 0.3
#: Mean cosine from which a layer, or a network, needs no further tries.
CLEAR = 0.8
#: A search ends after so many layers if their mean excess is smaller.
_FIRST_LAYERS, _FIRST_EXCESS = 8, 0.05
#: Most multiplications of one search: about ten seconds of one core.
MAX_WORK = 2**35
#: Multiplications that take the time of looking at a tensor, and of comparing a small candidate.
_TENSOR_WORK, _CANDIDATE_WORK = 2**13, 2**17


class WorkLimit:
    """Limits of a search: the multiplications that it may still use, and the kernels that it tries.

    Args:
        limit: number of multiplications.
        with_products: whether two tensors may be the factors of one kernel.
    """

    def __init__(self, limit: int = MAX_WORK, *, with_products: bool = True) -> None:
        self._remaining, self.with_products = limit, with_products

    def use(self, count: int) -> None:
        """Subtract work. Raises `ModelError` if none is left."""
        self._remaining -= count
        if self._remaining < 0:
            raise ModelError(
                "Too many tensors of the file have shapes of the network. Save the weights alone.",
                field="checkpoint",
            )


@dataclass
class Match:
    """Kernels of a suspect under one order of its channels.

    Attributes:
        orders: symmetry of the inputs, and order of the channels of each set as far as it is known.
        sizes: set -> the suspect's number of channels.
        chosen: name of a layer's kernel -> the best candidate.
        cosines: name of a layer's kernel -> mean cosine of its rows.
        excesses: name of a layer's kernel -> this cosine less the one with random kernels.
        searched: number of layers that were searched.
    """

    orders: Orders
    sizes: dict[int, int]
    chosen: dict[str, Candidate] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    excesses: dict[str, float] = field(default_factory=dict)
    searched: int = 0

    def used(self) -> set[int]:
        """Return the places of the tensors that are in use."""
        return {place for candidate in self.chosen.values() for place in candidate.places}

    def total(self) -> float:
        """Return the sum of the mean cosines of all layers; a layer without a kernel counts 0."""
        return sum(self.cosines.values())

    def excess(self) -> float:
        """Return how much more alike W0 than random kernels the layers are; one without a kernel counts 0."""
        return sum(self.excesses.values()) / max(1, self.searched)


@dataclass(frozen=True)
class Assigned:
    """Candidate for a layer.

    Attributes:
        candidate: the kernel.
        cosine: mean cosine of its rows.
        channels: new orders of the channels that it writes.
        chance: mean cosine with random kernels of W0's shape.
    """

    candidate: Candidate
    cosine: float
    channels: Mapping[int, Indices]
    chance: float


def search(
    layers: Sequence[ReferenceLayer],
    sets: Sequence[ChannelSet],
    tensors: Sequence[FileTensor],
    match: Match,
    work: WorkLimit,
) -> Match:
    """Complete a match, layer by layer; end early if the first layers are no more alike W0 than chance.

    Args:
        layers: W0's layers in execution order.
        sets: channel sets.
        tensors: of the file.
        match: known orders of channels, and kernels; it is changed.
        work: limit of the computation.

    Raises:
        ModelError: the limit is exceeded.
    """
    for number, layer in enumerate(layers):
        if number >= _FIRST_LAYERS and match.excess() < _FIRST_EXCESS:
            break
        match.searched = number + 1
        if layer.weight in match.chosen:
            continue
        options = _options(layer, sets, tensors, match, work)
        if len(options) > 1 and options[1].cosine > options[0].cosine - _NEAR:
            readers = _next_readers(layer, layers, sets, match)
            if readers:
                values = [_with_reader(x, layer, readers[0], sets, tensors, match, work) for x in options]
                options = [options[values.index(max(values))]]
        if options:
            accept(match, layer, options[0], sets)
    return match


def _options(
    layer: ReferenceLayer,
    sets: Sequence[ChannelSet],
    tensors: Sequence[FileTensor],
    match: Match,
    work: WorkLimit,
) -> list[Assigned]:
    """Return candidates for a layer that are more alike W0's kernel than chance, the most similar first."""
    used, slot = match.used(), Slot.of(layer, sets, match.sizes)
    free = [tensor for tensor in tensors if tensor.place not in used]
    work.use(_TENSOR_WORK * len(free))
    candidates = list(slot.candidates(free))
    options = _assigned(slot, candidates, sets, match, work)
    if work.with_products and (not options or options[0].cosine < CLEAR):
        options = [*options, *_assigned(slot, slot.products(free, work), sets, match, work)]
        options.sort(key=lambda option: -option.cosine)
    if _has_blocks(layer, sets) and len({candidate.places for candidate in candidates}) == 1:
        return options
    deviations = _DEVIATIONS if free_set(layer, sets, match.sizes) is None else _FREE_DEVIATIONS
    margin = deviations * math.sqrt(2 / max(1, layer.sketch.size))
    return [option for option in options if option.cosine > option.chance + margin]


def _next_readers(
    layer: ReferenceLayer, layers: Sequence[ReferenceLayer], sets: Sequence[ChannelSet], match: Match
) -> list[ReferenceLayer]:
    """Return the layers that read the channels whose order a layer gives."""
    free = free_set(layer, sets, match.sizes)
    return [
        other
        for other in layers
        if free is not None and other.weight not in match.chosen and other.sets_of_columns() == [free]
    ]


def _with_reader(
    option: Assigned,
    layer: ReferenceLayer,
    reader: ReferenceLayer,
    sets: Sequence[ChannelSet],
    tensors: Sequence[FileTensor],
    match: Match,
    work: WorkLimit,
) -> float:
    """Return the cosine of an option and of the best kernel that reads its channels in their new order."""
    orders = replace(match.orders, channels=dict(match.orders.channels))
    trial = Match(orders, dict(match.sizes), dict(match.chosen), dict(match.cosines))
    accept(trial, layer, option, sets)
    options = _options(reader, sets, tensors, trial, work)
    return option.cosine + (options[0].cosine if options else 0.0)


def _has_blocks(layer: ReferenceLayer, sets: Sequence[ChannelSet]) -> bool:
    """Return whether a layer reads or writes channels in blocks, whose order no sketch gives by itself."""
    return any(sets[number].blocks > 1 for number in (*layer.sets_of_rows(), *layer.sets_of_columns()))


def _assigned(
    slot: Slot, candidates: Iterable[Candidate], sets: Sequence[ChannelSet], match: Match, work: WorkLimit
) -> list[Assigned]:
    """Return the most similar candidates, the best first."""
    layer, options = slot.layer, []
    random = replace(layer, sketch=random_sketch(layer.weight, layer.sketch.shape))
    for _, _, candidate, rows in ranked(slot, candidates, sets, match, work)[:_FINALISTS]:
        side = slot.row_side(len(rows), sets, match.sizes)
        value, channels = assigned_rows(layer, rows, side, match.orders.channels, sets)
        chance, _ = assigned_rows(random, rows, side, match.orders.channels, sets)
        options.append(Assigned(candidate, value, channels, chance))
    return sorted(options, key=lambda option: -option.cosine)


def accept(match: Match, layer: ReferenceLayer, best: Assigned, sets: Sequence[ChannelSet]) -> None:
    """Add a layer's kernel to a match, with the order of the channels that it writes."""
    free = free_set(layer, sets, match.sizes)
    if free is not None:
        match.sizes[free] = best.candidate.kernel.shape[0]
    for number in layer.sets_of_rows():
        match.sizes.setdefault(number, sets[number].size)
    match.orders.channels |= best.channels
    match.chosen[layer.weight] = best.candidate
    match.cosines[layer.weight] = best.cosine
    match.excesses[layer.weight] = best.cosine - best.chance


def ranked(
    slot: Slot,
    candidates: Iterable[Candidate],
    sets: Sequence[ChannelSet],
    match: Match,
    work: WorkLimit,
) -> list[tuple[float, int, Candidate, Floats]]:
    """Return candidates in order of the similarity that they can have.

    Args:
        slot: the layer.
        candidates: kernels for it.
        sets: channel sets.
        match: known orders of channels.
        work: limit of the computation.

    Returns:
        Negative bound of the mean cosine, number, candidate, and the sketches of its rows, [O', s].
    """
    layer, entries = slot.layer, []
    projection = ordered_projection(slot, match.orders, sets)
    for number, candidate in enumerate(candidates):
        kernel = candidate.kernel
        work.use(
            _CANDIDATE_WORK + kernel.numel() * (projection.shape[2] + 16) + layer.sketch.size * len(kernel)
        )
        rows = projected_rows(layer, kernel, projection)
        side = slot.row_side(len(rows), sets, match.sizes)
        entries.append((-upper_bound(layer, rows, side, match.orders.channels), number, candidate, rows))
    return sorted(entries, key=lambda entry: entry[:2])
