"""Search for a transformer's matrices among the tensors of a file, by the sketches of W0's layers.

Sources give the coordinates of the residual stream. In these, pairs of matrices are compared with the
products of W0's heads, and single matrices with W0's neurons. The most similar ones are taken first. Gains of
norms are those with which the matrices after them are most similar.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from mtlsign.models.attention_layers import AttentionLayer
from mtlsign.models.unnamed_tensors import FileTensor
from mtlsign.watermark.verification.alignment import TransformerAligner
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices, best_assignment, quantized
from mtlsign.watermark.verification.alignment.joint_matrices import VALUE_ORDERS, is_joint
from mtlsign.watermark.verification.alignment.layers import ReferenceLayer, unit_rows
from mtlsign.watermark.verification.alignment.transformer import HeadProducts
from mtlsign.watermark.verification.matching.candidates import Work
from mtlsign.watermark.verification.matching.head_comparison import (
    assigned,
    best_triples,
    exclude_equal_places,
    head_targets,
    largest_head,
    part_of,
    similarities,
    spread,
    unit_vectors,
)
from mtlsign.watermark.verification.matching.stream_sources import MATRIX_SPEED
from mtlsign.watermark.verification.sketches import projection_matrix

#: Rows of one head's products, and neurons, that are compared for a choice.
_HEAD_ROWS, _NEURONS = 32, 64
#: Most vectors of a file that are tried as gains, or for each norm; with more of them, no gain is read.
_MAX_GAINS, _VECTORS_PER_GAIN = 256, 8
#: Least multiplications for a pair of matrices, and for one matrix.
_PAIR_WORK, _MATRIX_WORK = 2**12, 2**13


@dataclass(frozen=True)
class _HeadPair:
    """Chosen values and outputs of one attention layer.

    Attributes:
        values: values of its largest head, [head size, d].
        outputs: rows of the outputs of this head in W0's coordinates, [rows, head size].
    """

    values: Floats
    outputs: Floats


class TransformerSearch:
    """Search for the tensors of one architecture in one file.

    Args:
        aligner: alignment with W0, or its control with random sketches.
        shapes: of the network's tensors.
        sources: result of `find_sources`.
        tensors: of the file; matrices have W0's axes.
        work: limit of the multiplications.
    """

    def __init__(
        self,
        aligner: TransformerAligner,
        shapes: Mapping[str, tuple[int, ...]],
        sources: Mapping[str, FileTensor],
        tensors: Sequence[FileTensor],
        work: Work,
    ) -> None:
        self._aligner, self._shapes, self._work = aligner, shapes, work
        self._stream = aligner.products.stream
        self._sources, self._tensors = sources, tensors
        self._chosen: dict[str, Tensor] = {}
        self._used: set[int] = set()
        self._pairs: dict[str, _HeadPair] = {}
        self._orders: dict[str, Indices] = {}

    def run(self) -> dict[str, Tensor]:
        """Return the tensors by the network's names, as far as they are in the file.

        Raises:
            ModelError: the limit is exceeded.
        """
        for name, source in self._sources.items():
            self._choose(name, source.place, source.values)
        self._choose_values_and_outputs()
        self._choose_queries_and_keys()
        self._choose_neurons()
        self._choose_outputs_of_neurons()
        self._choose_gains()
        return self._chosen

    def _choose(self, name: str, place: int, values: Tensor) -> None:
        self._chosen[name] = values
        self._used.add(place)

    @cached_property
    def _turn(self) -> Floats:
        """Matrix R with W = W'·R for readers of the stream, [d, d]."""
        size = self._stream.size
        self._work.use(60 * size**3 // MATRIX_SPEED)
        turn = self._aligner.frame.turn(self._stream.parts[0], self._chosen)
        return np.eye(size) if turn is None else turn.numpy()

    def _projection(self, size: int) -> Floats:
        """Return R·S for sketches of a size, [d, s]."""
        return np.asarray(self._turn @ projection_matrix(self._stream.size, size))

    def _free(self, name: str) -> list[FileTensor]:
        """Return the matrices of a tensor's shape that are not in use."""
        shape = self._shapes[name]
        return [t for t in self._tensors if t.place not in self._used and tuple(t.values.shape) == shape]

    def _written(self, matrix: Tensor, rows: Indices | slice) -> Floats:
        """Return rows, in W0's coordinates, of a matrix that writes the stream."""
        values = matrix.double()
        if self._stream.subtracts_mean:
            values = values - values.mean(0, keepdim=True)
        return np.asarray(self._turn.T[rows] @ values.numpy())

    def _slots(self, *, queries: bool) -> Iterator[list[tuple[AttentionLayer, HeadProducts]]]:
        """Yield attention layers of equal shapes with the sketches of one of their products."""
        groups: dict[tuple[object, ...], list[tuple[AttentionLayer, HeadProducts]]] = {}
        for layer in self._stream.attentions:
            heads = self._aligner.heads.get(layer.query_key if queries else layer.value_output)
            if heads is not None:
                first, second = (layer.query, layer.key) if queries else (layer.value, layer.output)
                names = (first.weight, second if isinstance(second, str) else second.weight)
                shapes = tuple(self._shapes[name] for name in names)
                key = (*shapes, first.start, first.stop, layer.kv_heads, heads.sketch.shape[1])
                groups.setdefault((*key, heads.rows), []).append((layer, heads))
        yield from groups.values()

    def _choose_values_and_outputs(self) -> None:
        """Choose V and O of each layer by the products of their largest head."""
        rows = spread(self._stream.size, _HEAD_ROWS)
        for slots in self._slots(queries=False):
            first, heads = slots[0]
            size = self._aligner.products.head_sizes[first.module]
            projection = self._projection(heads.sketch.shape[1])
            stored, outputs = self._free(first.value.weight), self._free(first.output)
            orders = VALUE_ORDERS if is_joint(first) else VALUE_ORDERS[:1]
            values = [replace(t, values=o.in_thirds(t.values, size)) for t in stored for o in orders]
            if not values or not outputs:
                continue
            self._use(values, projection.shape[1], self._stream.size * size * first.kv_heads)
            self._use(outputs, len(rows), self._stream.size * size * first.heads)
            self._use_pairs(values, outputs, len(rows) * projection.shape[1], size, slots)
            parts = [part_of(first.value, t.values).numpy() @ projection for t in values]
            projected = np.array(parts).reshape(len(values), first.kv_heads, size, projection.shape[1])
            scores = np.full((len(values), len(outputs), len(slots)), -np.inf, dtype=np.float32)
            targets = [head_targets(own, rows) for _, own in slots]
            for column, tensor in enumerate(outputs):
                head = largest_head(tensor.values.double().T.numpy(), size)
                turned = self._written(tensor.values, rows)[:, head * size : (head + 1) * size]
                own = projected[:, head * first.kv_heads // first.heads]
                scores[:, column] = similarities(np.matmul(turned, own), targets)
            exclude_equal_places(scores, values, outputs)
            for row, column, slot in best_triples(scores, values, outputs):
                layer, tensor = slots[slot][0], outputs[column]
                matrix = stored[row // len(orders)]  # the alignment puts its parts in order
                self._choose(layer.value.weight, matrix.place, matrix.values)
                self._choose(layer.output, tensor.place, tensor.values)
                head = largest_head(tensor.values.double().T.numpy(), size)
                group = head * layer.kv_heads // layer.heads
                value = part_of(layer.value, values[row].values).numpy()[group * size : (group + 1) * size]
                turned = self._written(tensor.values, rows)[:, head * size : (head + 1) * size]
                self._pairs[layer.value_output] = _HeadPair(value, turned)

    def _choose_queries_and_keys(self) -> None:
        """Choose Q and K of each layer by the products of their largest head; thirds are chosen with V."""
        for slots in self._slots(queries=True):
            first, heads = slots[0]
            if first.query.weight == first.value.weight:
                continue
            size = self._aligner.products.head_sizes[first.module]
            projection = self._projection(heads.sketch.shape[1])
            queries, keys = self._free(first.query.weight), self._free(first.key.weight)
            if not queries or not keys:
                continue
            rows = spread(heads.rows, _HEAD_ROWS)
            self._use(keys, projection.shape[1], self._stream.size * size * first.kv_heads)
            self._use(queries, len(rows) * len(slots), self._stream.size * size)
            self._use_pairs(queries, keys, len(rows) * projection.shape[1], size * len(slots), slots)
            parts = [t.values.double().numpy() @ projection for t in keys]
            projected = np.array(parts).reshape(len(keys), first.kv_heads, size, projection.shape[1])
            scores = np.full((len(queries), len(keys), len(slots)), -np.inf, dtype=np.float32)
            for slot, (layer, own) in enumerate(slots):
                basis = self._turn @ self._aligner.products.bases[layer.query_key].numpy()[:, rows]
                targets = [head_targets(own, rows)]
                for row, tensor in enumerate(queries):
                    matrix = tensor.values.double().numpy()
                    head = largest_head(matrix, size)
                    turned = (matrix[head * size : (head + 1) * size] @ basis).T
                    group = projected[:, head * first.kv_heads // first.heads]
                    scores[row, :, slot] = similarities(np.matmul(turned, group), targets)[:, 0]
            exclude_equal_places(scores, queries, keys)
            for row, column, slot in best_triples(scores, queries, keys):
                layer = slots[slot][0]
                self._choose(layer.query.weight, queries[row].place, queries[row].values)
                self._choose(layer.key.weight, keys[column].place, keys[column].values)

    def _choose_neurons(self) -> None:
        """Choose the matrices of neurons that read the stream."""
        inner = self._stream.attention_weights
        for layers in self._linear(self._stream.readers - inner):
            free = self._free(layers[0].weight)
            sketch = layers[0].sketch.shape[1]
            neurons = len(layers[0].sketch)
            self._use(free, sketch, neurons * self._stream.size)
            self._use(free, len(layers) * min(neurons, _NEURONS), neurons * sketch)
            projection, chosen = self._projection(sketch), spread(neurons, _NEURONS)
            rows = [unit_rows(t.values.double().numpy() @ projection) for t in free]
            scores = np.array(
                [[float((x.directions[chosen] @ own.T).max(1).mean()) for own in rows] for x in layers]
            ).reshape(len(layers), len(free))
            for layer, column in zip(layers, assigned(scores), strict=True):
                if column >= 0:
                    self._choose(layer.weight, free[column].place, free[column].values)
                    self._work.use(neurons**2 * sketch // MATRIX_SPEED)
                    self._orders[layer.weight] = best_assignment(layer.directions @ rows[column].T)

    def _choose_outputs_of_neurons(self) -> None:
        """Choose the matrices that write the stream, whose columns are neurons of a known order."""
        outputs = frozenset(layer.output for layer in self._stream.attentions)
        rows = spread(self._stream.size, _NEURONS)
        for layers in self._linear(self._stream.writers - outputs):
            free, width = self._free(layers[0].weight), layers[0].shape[1]
            sketch = layers[0].sketch.shape[1]
            self._use(free, len(rows), self._stream.size * width)
            self._use(free, len(layers) * len(rows), width * sketch)
            turned = [self._written(t.values, rows) for t in free]
            norms = [t.values.double().norm(dim=0).clamp(min=1e-300).numpy() for t in free]
            scores = np.zeros((len(layers), len(free)))
            for number, layer in enumerate(layers):
                order = self._order_of_columns(layer)
                projection = projection_matrix(width, sketch) * layer.columns.reshape(-1, 1)
                for column, own in enumerate(turned):
                    projected = unit_rows((own / norms[column])[:, order] @ projection)
                    scores[number, column] = (layer.directions[rows] * projected).sum(1).mean()
            for layer, column in zip(layers, assigned(scores), strict=True):
                if column >= 0:
                    self._choose(layer.weight, free[column].place, free[column].values)

    def _order_of_columns(self, layer: ReferenceLayer) -> Indices:
        """Return the suspect's neuron of each input column of W0's; its number where it is not known."""
        sets = layer.sets_of_columns()
        for weight, order in self._orders.items():
            if len(sets) == 1 and self._aligner.neurons.layers[weight].sets_of_rows() == sets:
                return np.where(order >= 0, order, np.arange(len(order)))
        return np.arange(layer.shape[1])

    def _choose_gains(self) -> None:
        """Choose the gain of each norm with which the matrices after it are most similar; none is one."""
        size = self._stream.size
        vectors = [t for t in self._tensors if tuple(t.values.shape) == (size,)]
        most = max(_MAX_GAINS, _VECTORS_PER_GAIN * len(set(self._stream.gains.values())))
        if not vectors or len(vectors) > most:
            return
        gains = np.stack([np.ones(size), *(t.values.double().numpy() for t in vectors)])
        scores: dict[str, Floats] = {}
        for layer in self._stream.attentions:
            gain, pair = self._stream.gains.get(layer.value.weight), self._pairs.get(layer.value_output)
            if gain is not None and pair is not None:
                heads = self._aligner.heads[layer.value_output]
                targets = head_targets(heads, spread(size, _HEAD_ROWS))
                products = np.matmul(pair.outputs, self._with_gains(pair.values, gains, heads.sketch))
                scores[gain] = scores.get(gain, 0.0) + similarities(products, [targets])[:, 0]
        for weight, order in self._orders.items():
            gain, neurons = self._stream.gains.get(weight), self._aligner.neurons.layers[weight]
            if gain is not None:
                chosen = spread(len(order), _NEURONS)
                matrix = self._chosen[weight].double().numpy()[np.maximum(order[chosen], 0)]
                rows = unit_vectors(self._with_gains(matrix, gains, neurons.sketch))
                scores[gain] = scores.get(gain, 0.0) + (rows * neurons.directions[chosen]).sum(2).mean(1)
        for gain, values in scores.items():
            best = int(quantized(values).argmax())
            if best > 0 and self._shapes.get(gain) == (size,):
                self._chosen[gain] = vectors[best - 1].values

    def _with_gains(self, matrix: Floats, gains: Floats, sketch: Floats) -> Floats:
        """Return the sketches of rows under each gain, [gains, rows, s]."""
        self._work.use(gains.size * len(matrix) * sketch.shape[1] // MATRIX_SPEED)
        projection = self._projection(sketch.shape[1])
        return np.stack([(matrix * gain) @ projection for gain in gains])

    def _linear(self, names: frozenset[str]) -> Iterator[list[ReferenceLayer]]:
        """Yield W0's linear layers of these names that have one shape and sketches of one size."""
        groups: dict[tuple[object, ...], list[ReferenceLayer]] = {}
        for name, layer in self._aligner.neurons.layers.items():
            if name in names and len(layer.shape) == 2 and layer.groups == 1:
                groups.setdefault((layer.shape, layer.sketch.shape), []).append(layer)
        yield from groups.values()

    def _use(self, tensors: Sequence[FileTensor], times: int, numbers: int) -> None:
        """Subtract the work for a product of each tensor."""
        self._work.use(len(tensors) * (_MATRIX_WORK + times * numbers // MATRIX_SPEED))

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
        self._work.use(len(first) * len(second) * each)
