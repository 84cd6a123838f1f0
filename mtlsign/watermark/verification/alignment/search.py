"""Search for the order of channels: one set after another, until nothing moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mtlsign.models.channel_sets import ChannelSet
from mtlsign.watermark.verification.alignment.assignment import (
    Floats,
    Indices,
    best_assignment,
    quantized,
)
from mtlsign.watermark.verification.alignment.inputs import fit_mix
from mtlsign.watermark.verification.alignment.layers import unit_rows
from mtlsign.watermark.verification.alignment.orders import Orders
from mtlsign.watermark.verification.alignment.suspect import Side, SuspectLayer

#: Blocks of a grouped convolution that are compared in full with each of W0's blocks.
_BLOCK_CANDIDATES = 3


class Search:
    """Descent over the channel sets of one suspect.

    The similarity of two channels adds, over the kernels that write the channel, the cosines of the sketches
    of their rows, and over the kernels that read it, the products of their columns with W0's. Rows can be
    compared once the input channels are in order, columns once the rows are.

    Args:
        suspect: the suspect's layers.
        sets: channel sets.
        staying: result of `staying_similarities`.
        orders: first order; it is changed by `run`.
    """

    def __init__(
        self,
        suspect: Mapping[str, SuspectLayer],
        sets: Sequence[ChannelSet],
        staying: Sequence[float],
        orders: Orders,
    ) -> None:
        self._suspect, self._sets, self._staying, self.orders = suspect, sets, staying, orders
        self._writers = [
            [part for part in suspect.values() if number in part.rows.places] for number in range(len(sets))
        ]
        self._readers = [
            [part for part in suspect.values() if number in part.columns.places and part.layer.groups == 1]
            for number in range(len(sets))
        ]
        self._grouped = {
            part.layer.sets_of_columns()[0]: part
            for part in suspect.values()
            if part.layer.groups > 1 and part.layer.sets_of_columns()
        }
        self._projected: dict[str, tuple[object, Floats]] = {}

    def run(self, rounds: int) -> bool:
        """Improve the orders for at most `rounds` rounds; return whether nothing moved in the last one."""
        self.find_all_signs()
        for _ in range(rounds):
            before = {number: order.copy() for number, order in self.orders.channels.items()}
            self.orders.value = sum(self.update(number) for number in range(len(self._sets)))
            self.find_all_signs(missing=True)
            mixed = self._update_mix()
            same = all(n in before and np.array_equal(before[n], o) for n, o in self.orders.channels.items())
            if same and not mixed:
                return True
        return False

    def similarity(self, parts: Iterable[SuspectLayer] | None = None) -> float:
        """Return the mean cosine of the rows' sketches over layers that are not zero; 0 without any."""
        chosen = self._suspect.values() if parts is None else parts
        means = [self.layer_similarity(part) for part in chosen if part.kernel.any()]
        return float(np.mean(means)) if means else 0.0

    def layer_similarity(self, part: SuspectLayer) -> float:
        """Return the mean cosine of the sketches of a layer's rows."""
        cosines = self.row_cosines(part)
        return float((np.abs(cosines) if part.layer.free_signs else cosines).mean())

    def row_cosines(self, part: SuspectLayer) -> Floats:
        """Return the cosine between the sketch of each of W0's rows and of the row in its place, [O]."""
        layer = part.layer
        order = self._side_order(part.rows, layer.row_sets, layer.row_channels)
        if layer.groups == 1 or layer.is_depthwise:
            rows = self._projected_rows(part)[np.maximum(order, 0)] * (order >= 0)[:, None]
        else:
            scaled = replace(part, kernel=_scaled_columns(part))
            kernel = self._in_order(scaled).reshape(layer.groups, -1, *part.kernel.shape[1:])
            kernel = kernel * layer.columns[:, None, :, None]
            rows = unit_rows(kernel.reshape(len(order), -1) @ self._flat_projection(part))
        return np.asarray((layer.directions * rows).sum(1), dtype=np.float64)

    def aligned_kernel(self, part: SuspectLayer) -> Floats:
        """Return a kernel with W0's channels in W0's order, and its signs; missing channels are zeros."""
        kernel = self._in_order(part)[:, :, self.orders.square.order(part.layer.window)]
        if part.layer.reads_inputs:
            kernel = np.einsum("ock,cd->odk", kernel, self.orders.mix)
        signs = self.orders.signs.get(part.layer.weight)
        return kernel if signs is None else kernel * signs[:, None, None]

    def ordered_rows(self, part: SuspectLayer) -> Floats:
        """Return a kernel with rows in W0's order, [O, I'/groups, positions]; missing ones are zeros."""
        layer = part.layer
        rows = self._side_order(part.rows, layer.row_sets, layer.row_channels)
        kernel: Floats = part.kernel[np.maximum(rows, 0)] * (rows >= 0)[:, None, None]
        return kernel

    def ordered_columns(self, part: SuspectLayer) -> Floats:
        """Return a kernel without groups with columns and positions in W0's order, [O', I, positions]."""
        layer = part.layer
        columns = self._side_order(part.columns, layer.column_sets, layer.column_channels)
        kernel = part.kernel[:, np.maximum(columns, 0)] * (columns >= 0)[None, :, None]
        return kernel[:, :, self.orders.square.order(layer.window)]

    def _in_order(self, part: SuspectLayer) -> Floats:
        """Return a kernel with rows and columns in W0's order, [O, I/groups, positions]."""
        layer, kernel = part.layer, self.ordered_rows(part)
        if layer.groups == 1:
            columns = self._side_order(part.columns, layer.column_sets, layer.column_channels)
            return kernel[:, np.maximum(columns, 0)] * (columns >= 0)[None, :, None]
        numbers = layer.sets_of_columns()
        if not layer.is_depthwise and numbers and numbers[0] in self.orders.channels:
            within = self.orders.channels[numbers[0]].reshape(layer.groups, -1) % layer.shape[1]
            blocks = kernel.reshape(layer.groups, -1, *kernel.shape[1:])
            kernel = np.concatenate([block[:, order] for block, order in zip(blocks, within, strict=True)])
        return kernel

    def _side_order(self, side: Side, numbers: Indices, channels: Indices) -> Indices:
        """Return the suspect's row or column for each of W0's; −1 where there is none."""
        order = side.fixed.copy()
        for number, places in side.places.items():
            own = np.flatnonzero(numbers == number)
            partner = self._order_of(number)[channels[own]]
            partner = np.where(partner < len(places), partner, -1)
            order[own] = np.where(partner >= 0, places[np.maximum(partner, 0)], -1)
        return order

    def _order_of(self, number: int) -> Indices:
        """Return the order of a set; W0's if nothing shows another one."""
        return self.orders.channels.get(number, np.arange(self._sets[number].size))

    def _knows(self, numbers: Sequence[int]) -> bool:
        return all(number in self.orders.channels for number in numbers)

    def _comparable_rows(self, part: SuspectLayer) -> bool:
        return part.layer.groups > 1 or self._knows(part.layer.sets_of_columns())

    def _comparable_columns(self, part: SuspectLayer) -> bool:
        return part.layer.weight in self.orders.signs and self._knows(part.layer.sets_of_rows())

    def _flat_projection(self, part: SuspectLayer) -> Floats:
        """Return the sketch's matrix for a suspect's flattened rows, [I'/groups·positions, s].

        The orders of columns, positions and input channels, and W0's column norms, are moved into it.
        """
        layer = part.layer
        projection = layer.projection
        inverse = np.argsort(self.orders.square.order(layer.window))
        if layer.groups == 1:
            if layer.reads_inputs:
                scaled, norms = (
                    np.einsum("cd,dks->cks", self.orders.mix, projection),
                    np.ones(len(projection)),
                )
            else:
                scaled, norms = projection * layer.columns[0][:, None, None], part.scales[1][0]
            columns = self._side_order(part.columns, layer.column_sets, layer.column_channels)
            known = columns >= 0
            moved = np.zeros((part.kernel.shape[1], *projection.shape[1:]))
            moved[columns[known]] = scaled[known]
            projection = moved * norms[:, None, None]
        return projection[:, inverse].reshape(-1, projection.shape[2])

    def _projected_rows(self, part: SuspectLayer) -> Floats:
        """Return the sketches of unit length of a suspect's rows, [O', s]."""
        state = (
            tuple(self._order_of(number).tobytes() for number in part.columns.places)
            if part.layer.groups == 1
            else (),
            self.orders.mix.tobytes() if part.layer.reads_inputs else b"",
        )
        known = self._projected.get(part.layer.weight)
        if known is not None and known[0] == state:
            return known[1]
        rows = unit_rows(part.kernel.reshape(len(part.kernel), -1) @ self._flat_projection(part))
        self._projected[part.layer.weight] = (state, rows)
        return rows

    def row_similarity(self, part: SuspectLayer, number: int) -> Floats:
        """Return the similarity of W0's and the suspect's rows of one set, [size, size']."""
        layer = part.layer
        own = np.flatnonzero(layer.row_sets == number)
        directions = np.empty((len(own), layer.directions.shape[1]))
        directions[layer.row_channels[own]] = layer.directions[own]
        rows = self._projected_rows(part)[part.rows.places[number]]
        cosines: Floats = directions @ rows.T * layer.weighting
        return np.abs(cosines) if layer.free_signs else cosines

    def _column_similarity(self, part: SuspectLayer, number: int) -> Floats:
        """Return the products of W0's and the suspect's columns of one set, [size, size']."""
        layer = part.layer
        order = self._side_order(part.rows, layer.row_sets, layer.row_channels)
        known = order >= 0
        sketch = np.zeros((len(part.kernel), layer.sketch.shape[1]))
        sketch[order[known]] = (layer.sketch * self.orders.signs[layer.weight][:, None])[known]
        sketch *= part.scales[0][:, None]
        places = part.columns.places[number]
        products = sketch.T @ part.kernel[:, places].reshape(len(part.kernel), -1)
        products = products.reshape(layer.sketch.shape[1], len(places), -1)
        products = (
            products[:, :, self.orders.square.order(layer.window)] * part.scales[1][0][places][None, :, None]
        )
        own = np.flatnonzero(layer.column_sets == number)
        back = np.empty((len(own), *layer.back_projection.shape[1:]))
        back[layer.column_channels[own]] = layer.back_projection[own]
        similarity = back.reshape(len(own), -1) @ products.transpose(1, 2, 0).reshape(len(places), -1).T
        weighted: Floats = similarity * layer.weighting
        return weighted

    def _similarity(self, number: int) -> Floats | None:
        """Return the total similarity of W0's and the suspect's channels of one set; None if unknown."""
        writers = [
            part
            for part in self._writers[number]
            if self._comparable_rows(part) and (part.layer.groups == 1 or part.layer.is_depthwise)
        ]
        readers = [part for part in self._readers[number] if self._comparable_columns(part)]
        total: Floats | None = None
        for similarity in (
            *(self.row_similarity(part, number) for part in writers),
            *(self._column_similarity(part, number) for part in readers),
        ):
            total = similarity if total is None else total + similarity
        if total is not None and self.orders.prefers_own and total.shape[0] == total.shape[1]:
            total = total + self._staying[number] * np.eye(len(total))
        return total

    def update(self, number: int) -> float:
        """Put the channels of one set in order; return their total similarity."""
        if self._sets[number].blocks > 1:
            return self._update_blocks(number)
        similarity = self._similarity(number)
        if similarity is None:
            return 0.0
        order = best_assignment(similarity)
        self.orders.channels[number] = order
        for part in self._writers[number]:
            self._find_signs(part)
        known = order >= 0
        return float(similarity[np.flatnonzero(known), order[known]].sum())

    def find_all_signs(self, *, missing: bool = False) -> None:
        """Give the rows of every kernel their signs, or of those without signs so far."""
        for part in self._suspect.values():
            if not missing or part.layer.weight not in self.orders.signs:
                self._find_signs(part)

    def _find_signs(self, part: SuspectLayer) -> None:
        """Give each row the sign of its cosine, if a batch norm makes signs free."""
        if self._comparable_rows(part) and self._knows(part.layer.sets_of_rows()):
            signs = np.ones(len(part.layer.sketch))
            if part.layer.free_signs:
                signs = np.where(quantized(self.row_cosines(part)) < 0, -1.0, 1.0)
            self.orders.signs[part.layer.weight] = signs

    def _update_mix(self) -> bool:
        """Estimate the mix of the input channels; return whether it changed."""
        for part in self._suspect.values():
            layer = part.layer
            if layer.reads_inputs and layer.shape[1] > 1 and layer.weight in self.orders.signs:
                kernel = self.aligned_kernel(part)
                extra = fit_mix(kernel, layer.projection, layer.sketch)
                if extra is None:
                    return False
                self.orders.mix = self.orders.mix @ extra
                self._find_signs(part)
                return True
        return False

    def _update_blocks(self, number: int) -> float:
        """Put the blocks of two sets in order, and the channels within each block."""
        part, partner = self._grouped.get(number), self._sets[number].partner
        if part is None or partner is None:
            return 0.0  # the outputs of a grouped convolution move with its inputs
        inputs, outputs = self._similarity(number), self._similarity(partner)
        if inputs is None:
            return 0.0
        blocks = self._sets[number].blocks
        inner, outer = self._sets[number].size // blocks, self._sets[partner].size // blocks
        if outputs is None:
            outputs = np.zeros((outer * blocks, outer * blocks))
        pairs = inputs.reshape(blocks, inner, blocks, inner).transpose(0, 2, 1, 3)
        output_pairs = outputs.reshape(blocks, outer, blocks, outer).transpose(0, 2, 1, 3)
        promising = np.argsort(-quantized(pairs.max(3).sum(2)), axis=1, kind="stable")[:, :_BLOCK_CANDIDATES]
        values = np.full((blocks, blocks), -1e6)
        within: dict[tuple[int, int], tuple[Indices, Indices]] = {}
        for own, other in [(row, int(column)) for row in range(blocks) for column in promising[row]]:
            columns = best_assignment(pairs[own, other])
            similarity = output_pairs[own, other] + self._block_similarity(part, own, other, columns)
            rows = best_assignment(similarity)
            within[own, other] = columns, rows
            values[own, other] = (
                pairs[own, other][np.arange(inner), columns].sum() + similarity[np.arange(outer), rows].sum()
            )
        order = best_assignment(values)
        for own, other in enumerate(order.tolist()):
            if (own, other) not in within:
                within[own, other] = (
                    best_assignment(pairs[own, other]),
                    best_assignment(output_pairs[own, other]),
                )
        chosen = [(other, *within[own, other]) for own, other in enumerate(order.tolist())]
        self.orders.channels[number] = np.concatenate(
            [other * inner + columns for other, columns, _ in chosen]
        )
        self.orders.channels[partner] = np.concatenate([other * outer + rows for other, _, rows in chosen])
        for writer in (*self._writers[number], *self._writers[partner]):
            self._find_signs(writer)
        return float(values[np.arange(blocks), order].sum())

    def _block_similarity(self, part: SuspectLayer, own: int, other: int, columns: Indices) -> Floats:
        """Return the similarity of the rows of two blocks of a grouped convolution."""
        layer = part.layer
        block = part.kernel.reshape(layer.groups, -1, *part.kernel.shape[1:])[other][:, columns]
        projection = layer.projection * layer.columns[own][:, None, None]
        block = (
            block[:, :, self.orders.square.order(layer.window)]
            * part.scales[1][other][columns][None, :, None]
        )
        rows = unit_rows(block.reshape(len(block), -1) @ projection.reshape(-1, projection.shape[2]))
        directions = layer.directions.reshape(layer.groups, -1, rows.shape[1])[own]
        cosines: Floats = directions @ rows.T * layer.weighting
        return np.abs(cosines) if layer.free_signs else cosines


def _scaled_columns(part: SuspectLayer) -> Floats:
    """Return a kernel whose columns have equal norms, [O', I'/groups, positions]."""
    blocks = part.kernel.reshape(part.layer.groups, -1, *part.kernel.shape[1:])
    scaled: Floats = (blocks * part.scales[1][:, None, :, None]).reshape(part.kernel.shape)
    return scaled
