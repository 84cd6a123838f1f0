"""Search for the matrices of attention layers by the products of their heads with W0's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mtlsign.models.attention_layers import AttentionLayer, MatrixRows
from mtlsign.models.unnamed_tensors import FileTensor
from mtlsign.models.untrusted import MAX_GROWTH
from mtlsign.watermark.verification.alignment.assignment import RESOLUTION, Floats, Indices, quantized
from mtlsign.watermark.verification.alignment.transformer import HeadProducts
from mtlsign.watermark.verification.matching.head_comparison import (
    best_triples,
    exclude_equal_places,
    head_targets,
    largest_head,
    similarities,
    spread,
)
from mtlsign.watermark.verification.matching.joint_parts import (
    JointPart,
    are_disjoint,
    parts_of_joint,
    similarity_of_heads,
)
from mtlsign.watermark.verification.matching.stream_search import StreamSearch
from mtlsign.watermark.verification.matching.stream_sources import MATRIX_SPEED

#: Rows of one head's products that are compared for a choice.
HEAD_ROWS = 32
#: Least multiplications for a pair of matrices.
_PAIR_WORK = 2**12


@dataclass(frozen=True)
class HeadPair:
    """Chosen values and outputs of one attention layer.

    Attributes:
        values: values of its largest head, [head size, d].
        outputs: rows of the outputs of this head in W0's coordinates, [rows, head size].
    """

    values: Floats
    outputs: Floats


@dataclass
class AttentionSearch(StreamSearch):
    """Search for the matrices of attention layers.

    Attributes:
        pairs: chosen values and outputs by the name of their products.
        joint: chosen part of a joint matrix by the name of its layer.
    """

    pairs: dict[str, HeadPair] = field(default_factory=dict, init=False)
    joint: dict[str, JointPart] = field(default_factory=dict, init=False)

    def _choose_values_and_outputs(self) -> None:
        """Choose V and O of each layer by the products of their largest head."""
        rows = spread(self.stage.size, HEAD_ROWS)
        for slots in self._slots(queries=False):
            first, heads = slots[0]
            size, group = self.aligner.products.head_sizes[first.module], first.heads // first.kv_heads
            projection = self._projection(heads.sketch.shape[1])
            values, outputs = self._values(first), self._free(first.output, axis=1)
            if not values or not outputs:
                continue
            self._use(values, projection.shape[1])
            self._use(outputs, len(rows))
            projected = [self._projected_heads(part, projection, size) for part in values]
            fits = _fitting(projected, [tensor.values.shape[1] for tensor in outputs], group * size)
            self._use_pairs(fits, len(rows) * projection.shape[1], size, slots)
            scores = np.full((len(values), len(outputs), len(slots)), -np.inf, dtype=np.float32)
            targets = [head_targets(own, rows) for _, own in slots]
            for column, tensor in enumerate(outputs):
                if fits[column]:
                    head = largest_head(tensor.values.double().T.numpy(), size)
                    turned = self._written(tensor.values, rows)[:, head * size : (head + 1) * size]
                    own = np.stack([projected[row][head // group] for row in fits[column]])
                    scores[fits[column], column] = similarities(np.matmul(turned, own), targets)
            exclude_equal_places(scores, values, outputs)
            for row, column, slot in best_triples(scores, values, outputs):
                self._choose_pair(slots[slot], values[row], outputs[column], rows)

    def _choose_pair(
        self, slot: tuple[AttentionLayer, HeadProducts], value: FileTensor, output: FileTensor, rows: Indices
    ) -> None:
        """Choose V and O of one layer; V as the part of a joint matrix that is most similar in all heads."""
        layer, heads = slot
        if isinstance(value, JointPart) and value.source.place in self.used:
            return  # another layer has other rows of it
        size, group = self.aligner.products.head_sizes[layer.module], layer.heads // layer.kv_heads
        written = self._written(output.values, rows).reshape(len(rows), -1, size)
        if isinstance(value, JointPart):
            parts, projection = list(parts_of_joint(value.source, 1, group, size)), heads.sketch.shape[1]
            scores = [
                similarity_of_heads(
                    written.transpose(1, 0, 2),
                    self._projected_heads(part, self._projection(projection), size),
                    heads,
                    rows,
                )
                for part in parts
            ]
            value = self.joint[layer.module] = parts[int(quantized(np.array(scores)).argmax())]
            self.used.add(value.source.place)
        self._choose_part(layer.value, value)
        self._choose(layer.output, output.place, output.values)
        head = largest_head(output.values.double().T.numpy(), size)
        matrix = value.values.double().numpy().reshape(-1, size, value.values.shape[1])[head // group]
        self.pairs[layer.value_output] = HeadPair(matrix, written[:, head])

    def _choose_queries_and_keys(self) -> None:
        """Choose Q and K of each layer by the products of their largest head."""
        for group in self._slots(queries=True):
            slots = [slot for slot in group if slot[0].module not in self.joint]
            for layer, heads in group:
                if layer.module in self.joint:
                    self._choose_parts_of_joint(layer, heads)
            if slots:
                self._choose_separate(slots)

    def _choose_separate(self, slots: Sequence[tuple[AttentionLayer, HeadProducts]]) -> None:
        """Choose Q and K of layers of one shape among separate matrices."""
        first, heads = slots[0]
        size, group = self.aligner.products.head_sizes[first.module], first.heads // first.kv_heads
        projection = self._projection(heads.sketch.shape[1])
        queries, keys = self._separate(first.query, size), self._separate(first.key, size)
        if not queries or not keys:
            return
        rows = spread(heads.rows, HEAD_ROWS)
        self._use(keys, projection.shape[1])
        self._use(queries, len(rows) * len(slots))
        projected = [self._projected_heads(part, projection, size) for part in keys]
        fits = _fitting(projected, [len(tensor.values) for tensor in queries], group * size)
        self._use_pairs(fits, len(rows) * projection.shape[1], size * len(slots), slots)
        bases = [self.aligner.products.bases[layer.query_key].numpy()[:, rows] for layer, _ in slots]
        scores = np.full((len(queries), len(keys), len(slots)), -np.inf, dtype=np.float32)
        for row, tensor in enumerate(queries):
            if not fits[row]:
                continue
            matrix = tensor.values.double().numpy()
            head = largest_head(matrix, size)
            own = matrix[head * size : (head + 1) * size] @ self.turn
            right = np.stack([projected[column][head // group] for column in fits[row]])
            for slot, (basis, (_, target)) in enumerate(zip(bases, slots, strict=True)):
                products = np.matmul((own @ basis).T, right)
                scores[row, fits[row], slot] = similarities(products, [head_targets(target, rows)])[:, 0]
        exclude_equal_places(scores, queries, keys)
        for row, column, slot in best_triples(scores, queries, keys):
            self._choose_part(slots[slot][0].query, queries[row])
            self._choose_part(slots[slot][0].key, keys[column])

    def _choose_parts_of_joint(self, layer: AttentionLayer, heads: HeadProducts) -> None:
        """Choose Q and K among the other parts of the joint matrix of V."""
        value, rows = self.joint[layer.module], spread(heads.rows, HEAD_ROWS)
        size, group = self.aligner.products.head_sizes[layer.module], layer.heads // layer.kv_heads
        basis = self.turn @ self.aligner.products.bases[layer.query_key].numpy()[:, rows]
        projection, best, chosen = self._projection(heads.sketch.shape[1]), -np.inf, None
        keys = list(parts_of_joint(value.source, 1, group, size))
        projected = [self._projected_heads(key, projection, size) for key in keys]
        for query in parts_of_joint(value.source, group, group, size):
            left = (query.values.double().numpy() @ basis).reshape(-1, size, len(rows)).transpose(0, 2, 1)
            for key, right in zip(keys, projected, strict=True):
                if are_disjoint(value, query, key):
                    score = similarity_of_heads(left, right, heads, rows)
                    if score > best + RESOLUTION:
                        best, chosen = score, (query, key)
        if chosen is not None:
            self._choose_part(layer.query, chosen[0])
            self._choose_part(layer.key, chosen[1])

    def _values(self, layer: AttentionLayer) -> list[FileTensor]:
        """Return the tensors that values can be, also parts of joint matrices."""
        size, group = self.aligner.products.head_sizes[layer.module], layer.heads // layer.kv_heads
        columns, most = self.shapes[layer.value.weight][1], (group + 2) * layer.kv_heads * size * MAX_GROWTH
        joint = [
            part
            for tensor in self.tensors
            if tensor.place not in self.used
            and tensor.values.shape[-1] == columns
            and len(tensor.values) <= most
            for part in parts_of_joint(tensor, 1, group, size)
        ]
        return [*self._separate(layer.value, size), *joint]

    def _separate(self, rows: MatrixRows, size: int) -> list[FileTensor]:
        """Return the matrices not in use that queries, keys or values of some number of heads can be."""
        columns, most = self.shapes[rows.weight][1], MAX_GROWTH * (rows.stop - rows.start)
        return [
            t
            for t in self.tensors
            if t.place not in self.used
            and t.values.dim() == 2
            and t.values.shape[1] == columns
            and len(t.values) <= most
            and len(t.values) % size == 0
        ]

    def _projected_heads(self, part: FileTensor, projection: Floats, size: int) -> Floats:
        """Return the sketches of keys or values, [heads, head size, s]."""
        projected = part.values.double().numpy() @ projection
        return projected.reshape(-1, size, projection.shape[1])

    def _choose_part(self, rows: MatrixRows, part: FileTensor) -> None:
        """Use a separate matrix, or a part of W0's joint matrix, whose missing parts are zeros."""
        count, total = rows.stop - rows.start, self.shapes[rows.weight][0]
        if count == total:
            self._choose(rows.weight, part.place, part.values)
            return
        shape = (total // count * len(part.values), part.values.shape[1])
        matrix = self.chosen.get(rows.weight)
        matrix = torch.zeros(shape) if matrix is None or tuple(matrix.shape) != shape else matrix
        start = rows.start // count * len(part.values)
        matrix[start : start + len(part.values)] = part.values
        self._choose(rows.weight, part.place, matrix)

    def _slots(self, *, queries: bool) -> Iterator[list[tuple[AttentionLayer, HeadProducts]]]:
        """Yield attention layers of equal shapes with the sketches of one of their products."""
        groups: dict[tuple[object, ...], list[tuple[AttentionLayer, HeadProducts]]] = {}
        for layer in self.stage.attentions:
            heads = self.aligner.heads.get(layer.query_key if queries else layer.value_output)
            if heads is not None:
                first, second = (layer.query, layer.key) if queries else (layer.value, layer.output)
                names = (first.weight, second if isinstance(second, str) else second.weight)
                shapes = tuple(self.shapes[name] for name in names)
                key = (*shapes, first.start, first.stop, layer.kv_heads, heads.sketch.shape[1])
                groups.setdefault((*key, heads.rows), []).append((layer, heads))
        yield from groups.values()

    def _use_pairs(
        self,
        fits: Sequence[Sequence[int]],
        numbers: int,
        size: int,
        slots: Sequence[tuple[AttentionLayer, HeadProducts]],
    ) -> None:
        """Subtract the work for a product of each fitting pair, and its comparison with W0's heads."""
        compared = size + sum(layer.heads for layer, _ in slots)
        each = max(_PAIR_WORK, numbers * compared // MATRIX_SPEED) + 2**10 * len(slots)
        self.work.use(sum(map(len, fits)) * each)


def _fitting(projected: Sequence[Floats], rows: Sequence[int], group_rows: int) -> list[list[int]]:
    """Return which keys or values fit each matrix of queries or outputs: they have as many groups of heads.

    Args:
        projected: sketches of keys or values, [heads, head size, s].
        rows: of the matrices of queries, or columns of those of outputs.
        group_rows: rows of the queries of one group.
    """
    numbers: dict[int, list[int]] = {}
    for number, own in enumerate(projected):
        numbers.setdefault(len(own), []).append(number)
    return [[] if count % group_rows else numbers.get(count // group_rows, []) for count in rows]
