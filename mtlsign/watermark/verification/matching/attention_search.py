"""Search for the matrices of attention layers by the products of their heads with W0's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mtlsign.models.attention_layers import AttentionLayer, MatrixRows
from mtlsign.models.unnamed_tensors import FileTensor
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
    HeadLayout,
    JointPart,
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
        rows = spread(self._stream.size, HEAD_ROWS)
        for slots in self._slots(queries=False):
            first, heads = slots[0]
            size = self.aligner.products.head_sizes[first.module]
            projection = self._projection(heads.sketch.shape[1])
            values, outputs = self._values(first), self._free(first.output)
            if not values or not outputs:
                continue
            self._use(values, projection.shape[1], self._stream.size * size * first.kv_heads)
            self._use(outputs, len(rows), self._stream.size * size * first.heads)
            self._use_pairs(values, outputs, len(rows) * projection.shape[1], size, slots)
            projected = self._projected_heads(first, values, projection)
            scores = np.full((len(values), len(outputs), len(slots)), -np.inf, dtype=np.float32)
            targets = [head_targets(own, rows) for _, own in slots]
            for column, tensor in enumerate(outputs):
                head = largest_head(tensor.values.double().T.numpy(), size)
                turned = self._written(tensor.values, rows)[:, head * size : (head + 1) * size]
                own = projected[:, head * first.kv_heads // first.heads]
                scores[:, column] = similarities(np.matmul(turned, own), targets)
            exclude_equal_places(scores, values, outputs)
            for row, column, slot in best_triples(scores, values, outputs):
                layer, tensor, part = slots[slot][0], outputs[column], values[row]
                if isinstance(part, JointPart) and part.source.place in self.used:
                    continue  # another layer has other rows of it
                written = self._written(tensor.values, rows).reshape(len(rows), layer.heads, size)
                value = self._best_value(slots[slot], part, written, rows)
                self._choose_part(layer.value, value)
                self._choose(layer.output, tensor.place, tensor.values)
                head = largest_head(tensor.values.double().T.numpy(), size)
                group = head * layer.kv_heads // layer.heads
                matrix = value.values.double().numpy()[group * size : (group + 1) * size]
                self.pairs[layer.value_output] = HeadPair(matrix, written[:, head])

    def _best_value(
        self, slot: tuple[AttentionLayer, HeadProducts], value: FileTensor, written: Floats, rows: Indices
    ) -> FileTensor:
        """Return the part of the same joint matrix that is most similar in all heads; others as they are."""
        (layer, heads), best = slot, value
        if isinstance(value, JointPart):
            parts = self._parts_of(value.source, layer, layer.value)
            left = written.transpose(1, 0, 2)
            right = self._projected_heads(layer, parts, self._projection(heads.sketch.shape[1]))
            scores = [similarity_of_heads(left, own, heads, rows) for own in right]
            best = parts[int(quantized(np.array(scores)).argmax())]
            assert isinstance(best, JointPart)
            self.joint[layer.module] = best
            self.used.add(best.source.place)
        return best

    def _choose_queries_and_keys(self) -> None:
        """Choose Q and K of each layer by the products of their largest head."""
        for group in self._slots(queries=True):
            slots = [slot for slot in group if slot[0].module not in self.joint]
            for layer, heads in group:
                if layer.module in self.joint:
                    self._choose_parts_of_joint(layer, heads)
            if not slots:
                continue
            first, heads = slots[0]
            size = self.aligner.products.head_sizes[first.module]
            projection = self._projection(heads.sketch.shape[1])
            queries, keys = self._separate(first.query), self._separate(first.key)
            if not queries or not keys:
                continue
            rows = spread(heads.rows, HEAD_ROWS)
            self._use(keys, projection.shape[1], self._stream.size * size * first.kv_heads)
            self._use(queries, len(rows) * len(slots), self._stream.size * size)
            self._use_pairs(queries, keys, len(rows) * projection.shape[1], size * len(slots), slots)
            projected = self._projected_heads(first, keys, projection)
            scores = np.full((len(queries), len(keys), len(slots)), -np.inf, dtype=np.float32)
            for slot, (layer, own) in enumerate(slots):
                basis = self._turn @ self.aligner.products.bases[layer.query_key].numpy()[:, rows]
                targets = [head_targets(own, rows)]
                for row, tensor in enumerate(queries):
                    matrix = tensor.values.double().numpy()
                    head = largest_head(matrix, size)
                    turned = (matrix[head * size : (head + 1) * size] @ basis).T
                    right = projected[:, head * first.kv_heads // first.heads]
                    scores[row, :, slot] = similarities(np.matmul(turned, right), targets)[:, 0]
            exclude_equal_places(scores, queries, keys)
            for row, column, slot in best_triples(scores, queries, keys):
                layer = slots[slot][0]
                self._choose_part(layer.query, queries[row])
                self._choose_part(layer.key, keys[column])

    def _choose_parts_of_joint(self, layer: AttentionLayer, heads: HeadProducts) -> None:
        """Choose Q and K among the other parts of the joint matrix of V."""
        value, rows = self.joint[layer.module], spread(heads.rows, HEAD_ROWS)
        basis = self._turn @ self.aligner.products.bases[layer.query_key].numpy()[:, rows]
        best, chosen = -np.inf, None
        keys = self._parts_of(value.source, layer, layer.key)
        projected = self._projected_heads(layer, keys, self._projection(heads.sketch.shape[1]))
        for query in self._parts_of(value.source, layer, layer.query):
            left = query.values.double().numpy() @ basis
            left = left.reshape(layer.heads, -1, len(rows)).transpose(0, 2, 1)
            for key, right in zip(keys, projected, strict=True):
                parts = (value, query, key)
                if len({part.blocks for part in parts}) > 1 or value.overlaps(query):
                    continue
                if value.overlaps(key) or query.overlaps(key):
                    continue
                score = similarity_of_heads(left, right, heads, rows)
                if score > best + RESOLUTION:
                    best, chosen = score, (query, key)
        if chosen is not None:
            self._choose_part(layer.query, chosen[0])
            self._choose_part(layer.key, chosen[1])

    def _values(self, layer: AttentionLayer) -> list[FileTensor]:
        """Return the tensors that values can be, also parts of joint matrices."""
        columns = self.shapes[layer.value.weight][1]
        free = [t for t in self.tensors if t.place not in self.used and t.values.shape[-1] == columns]
        joint = [part for tensor in free for part in self._parts_of(tensor, layer, layer.value)]
        return [*self._separate(layer.value), *joint]

    def _separate(self, rows: MatrixRows) -> list[FileTensor]:
        """Return the matrices with the shape of queries, keys or values that are not in use."""
        shape = (rows.stop - rows.start, self.shapes[rows.weight][1])
        return [t for t in self.tensors if t.place not in self.used and tuple(t.values.shape) == shape]

    def _parts_of(self, source: FileTensor, layer: AttentionLayer, rows: MatrixRows) -> list[JointPart]:
        size = self.aligner.products.head_sizes[layer.module]
        layout = HeadLayout(layer.heads, layer.kv_heads, size)
        return list(parts_of_joint(source, rows.stop - rows.start, layout))

    def _projected_heads(
        self, layer: AttentionLayer, parts: Sequence[FileTensor], projection: Floats
    ) -> Floats:
        """Return the sketches of keys or values, [parts, heads, head size, s]."""
        size = self.aligner.products.head_sizes[layer.module]
        projected = np.array([part.values.double().numpy() @ projection for part in parts])
        return projected.reshape(len(parts), layer.kv_heads, size, projection.shape[1])

    def _choose_part(self, rows: MatrixRows, part: FileTensor) -> None:
        """Use a part of W0's joint matrix, whose missing parts are zeros, or a separate matrix."""
        if rows.stop - rows.start == self.shapes[rows.weight][0]:
            self._choose(rows.weight, part.place, part.values)
            return
        matrix = self.chosen.get(rows.weight, torch.zeros(self.shapes[rows.weight]))
        matrix[rows.start : rows.stop] = part.values
        self._choose(rows.weight, part.place, matrix)

    def _slots(self, *, queries: bool) -> Iterator[list[tuple[AttentionLayer, HeadProducts]]]:
        """Yield attention layers of equal shapes with the sketches of one of their products."""
        groups: dict[tuple[object, ...], list[tuple[AttentionLayer, HeadProducts]]] = {}
        for layer in self._stream.attentions:
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
        first: Sequence[FileTensor],
        second: Sequence[FileTensor],
        numbers: int,
        size: int,
        slots: Sequence[tuple[AttentionLayer, HeadProducts]],
    ) -> None:
        """Subtract the work for a product of each pair, and its comparison with W0's heads."""
        compared = size + sum(layer.heads for layer, _ in slots)
        each = max(_PAIR_WORK, numbers * compared // MATRIX_SPEED) + 2**10 * len(slots)
        self.work.use(len(first) * len(second) * each)
