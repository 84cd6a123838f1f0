"""Sketches of a candidate's rows, and their similarity to those of W0's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mtlsign.models.channel_sets import ChannelSet
from mtlsign.watermark.verification.alignment.assignment import (
    RESOLUTION,
    Floats,
    Indices,
    best_assignment,
    quantized,
)
from mtlsign.watermark.verification.alignment.layers import NO_SET, ReferenceLayer, unit_rows
from mtlsign.watermark.verification.alignment.orders import Orders
from mtlsign.watermark.verification.alignment.suspect import Side
from mtlsign.watermark.verification.matching.candidates import Slot

#: Rounds that give rows and columns equal norms before rows are compared.
_EQUALIZING_ROUNDS = 4


def ordered_projection(slot: Slot, orders: Orders, sets: Sequence[ChannelSet]) -> Floats:
    """Return the sketch's matrix for a suspect's columns and positions, [I', positions, s]."""
    layer = slot.layer
    projection, inverse = layer.projection, np.argsort(orders.square.order(layer.window))
    if layer.groups == 1:
        if layer.reads_inputs:
            projection = np.einsum("cd,dks->cks", orders.mix, projection)
        else:
            projection = projection * layer.columns[0][:, None, None]
        columns = _places(slot.columns, layer.column_sets, layer.column_channels, orders.channels, sets)
        known = columns >= 0
        moved = np.zeros((slot.columns.size, *projection.shape[1:]))
        moved[columns[known]] = projection[known]
        projection = moved
    ordered: Floats = projection[:, inverse]
    return ordered


def _places(
    side: Side,
    numbers: Indices,
    channels: Indices,
    orders: Mapping[int, Indices],
    sets: Sequence[ChannelSet],
) -> Indices:
    """Return the suspect's row or column for each of W0's; −1 where there is none."""
    order = side.fixed.copy()
    for number, places in side.places.items():
        own = np.flatnonzero(numbers == number)
        partner = orders.get(number, np.arange(sets[number].size))[channels[own]]
        partner = np.where(partner < len(places), partner, -1)
        order[own] = np.where(partner >= 0, places[np.maximum(partner, 0)], -1)
    return order


def projected_rows(layer: ReferenceLayer, kernel: Tensor, projection: Floats) -> Floats:
    """Return the sketches of unit length of a candidate's rows, [O', s], after columns get equal norms."""
    blocks = kernel.to(torch.float64).reshape(len(kernel), -1, layer.positions)
    if layer.groups == 1 and not layer.reads_inputs:
        squares = blocks.square().sum(2)
        columns = torch.ones(squares.shape[1], dtype=torch.float64)
        for _ in range(_EQUALIZING_ROUNDS):
            rows = _inverse(squares @ columns)
            columns = _inverse(rows @ squares)
        blocks = blocks * columns.sqrt()[None, :, None]
    return unit_rows(
        (blocks.flatten(1) @ torch.from_numpy(projection.reshape(-1, projection.shape[2]))).numpy()
    )


def _inverse(sums: Tensor) -> Tensor:
    """Return 1/x, and 1 for sums that are not positive."""
    return 1 / torch.where(sums > 0, sums, torch.ones_like(sums))


def _directions(layer: ReferenceLayer, number: int) -> Floats:
    """Return the unit sketches of W0's rows of one set, by channel: [size, s]."""
    own = np.flatnonzero(layer.row_sets == number)
    directions: Floats = layer.directions[own[np.argsort(layer.row_channels[own])]]
    return directions


def _similarities(layer: ReferenceLayer, rows: Floats, places: Indices, number: int) -> Floats:
    """Return the cosines of W0's and a candidate's rows of one set, [size, size']."""
    cosines: Floats = _directions(layer, number) @ rows[places].T
    return np.abs(cosines) if layer.free_signs else cosines


def _ordered_similarity(
    layer: ReferenceLayer, rows: Floats, places: Indices, number: int, order: Indices
) -> float:
    """Return the sum of the cosines of W0's channels of one set and their partners; 0 without one."""
    valid = (order >= 0) & (order < len(places))
    partners = rows[places[np.where(valid, order, 0)]]
    cosines = (_directions(layer, number) * partners).sum(1) * valid
    return float((np.abs(cosines) if layer.free_signs else cosines).sum())


def _fixed_similarity(layer: ReferenceLayer, rows: Floats, side: Side) -> float:
    """Return the sum of the cosines of rows that belong to no set."""
    own = np.flatnonzero(layer.row_sets == NO_SET)
    cosines = (layer.directions[own] * rows[side.fixed[own]]).sum(1)
    return float((np.abs(cosines) if layer.free_signs else cosines).sum())


def upper_bound(layer: ReferenceLayer, rows: Floats, side: Side, orders: Mapping[int, Indices]) -> float:
    """Return a mean cosine that no order of the unknown channels exceeds, rounded like other similarities."""
    total = _fixed_similarity(layer, rows, side)
    for number, places in side.places.items():
        order = orders.get(number)
        if order is None:
            total += float(_similarities(layer, rows, places, number).max(1).sum())
        else:
            total += _ordered_similarity(layer, rows, places, number, order)
    return _rounded(total / len(layer.sketch))


def assigned_rows(
    layer: ReferenceLayer,
    rows: Floats,
    side: Side,
    orders: Mapping[int, Indices],
    sets: Sequence[ChannelSet],
) -> tuple[float, dict[int, Indices]]:
    """Return the mean cosine of a candidate's rows under the best order, and the new orders of sets.

    Args:
        layer: W0's layer.
        rows: sketches of the candidate's rows, [O', s].
        side: places of channels among the rows.
        orders: known orders of sets.
        sets: channel sets; one of several blocks stays in its order.
    """
    total, new_orders = _fixed_similarity(layer, rows, side), {}
    for number, places in side.places.items():
        order = orders.get(number)
        if order is None and sets[number].blocks > 1:
            total += float(_similarities(layer, rows, places, number).max(1).sum())
            continue
        if order is None:
            order = new_orders[number] = best_assignment(_similarities(layer, rows, places, number))
        total += _ordered_similarity(layer, rows, places, number, order)
    return _rounded(total / len(layer.sketch)), new_orders


def _rounded(value: float) -> float:
    """Round a similarity, so that machines agree."""
    return float(quantized(np.array(value))) * RESOLUTION
