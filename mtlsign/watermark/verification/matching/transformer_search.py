"""Search for the matrices of one stage among the tensors of a file, by the sketches of W0's layers.

Sources give the coordinates of the residual stream. In these, pairs of matrices are compared with the
products of W0's heads, and single matrices with W0's neurons. The most similar ones are taken first. Gains of
norms are those with which the matrices after them are most similar.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mtlsign.watermark.verification.alignment.assignment import (
    Floats,
    Indices,
    best_assignment,
    quantized,
)
from mtlsign.watermark.verification.alignment.layers import ReferenceLayer, unit_rows
from mtlsign.watermark.verification.matching.attention_search import HEAD_ROWS, AttentionSearch
from mtlsign.watermark.verification.matching.head_comparison import (
    assigned,
    head_targets,
    similarities,
    spread,
    unit_vectors,
)
from mtlsign.watermark.verification.matching.stream_search import MAX_GAINS
from mtlsign.watermark.verification.matching.stream_sources import MATRIX_SPEED
from mtlsign.watermark.verification.sketches import projection_matrix

#: Neurons that are compared for a choice.
_NEURONS = 64
#: Vectors of a file that are tried for each norm, if there are more than `MAX_GAINS`.
_VECTORS_PER_GAIN = 8


@dataclass
class TransformerSearch(AttentionSearch):
    """Search for all matrices and gains of one stage.

    Attributes:
        orders: the suspect's neuron of each one of W0 by the name of their matrix.
    """

    orders: dict[str, Indices] = field(default_factory=dict, init=False)

    def run(self) -> None:
        """Add the tensors of the stage to `chosen`, as far as they are in the file.

        Raises:
            ModelError: the limit is exceeded.
        """
        self._choose_values_and_outputs()
        self._choose_queries_and_keys()
        self._choose_neurons()
        self._choose_outputs_of_neurons()
        self._choose_gains()

    def _choose_neurons(self) -> None:
        """Choose the matrices of neurons that read the stream."""
        inner = self._stream.attention_weights
        for layers in self._linear(self.stage.readers - inner):
            free = self._free(layers[0].weight, axis=0)
            sketch, neurons = layers[0].sketch.shape[1], len(layers[0].sketch)
            projection, chosen = self._projection(sketch), spread(neurons, _NEURONS)
            self._use(free, sketch)
            self.work.use(
                sum(len(layers) * len(chosen) * len(t.values) * sketch for t in free) // MATRIX_SPEED
            )
            rows = [unit_rows(t.values.double().numpy() @ projection) for t in free]
            scores = np.array(
                [[float((x.directions[chosen] @ own.T).max(1).mean()) for own in rows] for x in layers]
            ).reshape(len(layers), len(free))
            for layer, column in zip(layers, assigned(scores), strict=True):
                if column >= 0:
                    self._choose(layer.weight, free[column].place, free[column].values)
                    self.work.use(neurons * len(rows[column]) * sketch // MATRIX_SPEED)
                    self.orders[layer.weight] = best_assignment(layer.directions @ rows[column].T)

    def _choose_outputs_of_neurons(self) -> None:
        """Choose the matrices that write the stream, whose columns are neurons of a known order."""
        outputs = frozenset(layer.output for layer in self.stage.attentions)
        rows = spread(self.stage.size, _NEURONS)
        for layers in self._linear(self.stage.writers - outputs):
            free, width = self._free(layers[0].weight, axis=1), layers[0].shape[1]
            sketch = layers[0].sketch.shape[1]
            self._use(free, len(rows))
            self.work.use(len(free) * len(layers) * len(rows) * width * sketch // MATRIX_SPEED)
            turned = [self._written(t.values, rows) for t in free]
            norms = [t.values.double().norm(dim=0).clamp(min=1e-300).numpy() for t in free]
            scores = np.full((len(layers), len(free)), -1.0)
            for number, layer in enumerate(layers):
                order, count = self._order_of_columns(layer)
                projection = projection_matrix(width, sketch) * layer.columns.reshape(-1, 1)
                for column, own in enumerate(turned):
                    if own.shape[1] == count:
                        ordered = (own / norms[column])[:, np.maximum(order, 0)] * (order >= 0)
                        projected = unit_rows(ordered @ projection)
                        scores[number, column] = (layer.directions[rows] * projected).sum(1).mean()
            for number, column in enumerate(assigned(scores)):
                if column >= 0 and scores[number, column] > -1:
                    self._choose(layers[number].weight, free[column].place, free[column].values)

    def _order_of_columns(self, layer: ReferenceLayer) -> tuple[Indices, int]:
        """Return the suspect's neuron of each input column of W0's, −1 for none, and the number of neurons.

        Without a known order it is W0's.
        """
        sets = layer.sets_of_columns()
        for weight, order in self.orders.items():
            if len(sets) == 1 and self.aligner.neurons.layers[weight].sets_of_rows() == sets:
                return order, len(self.chosen[weight])
        return np.arange(layer.shape[1]), layer.shape[1]

    def _choose_gains(self) -> None:
        """Choose the gain of each norm with which the matrices after it are most similar; none is one."""
        size = self.stage.size
        vectors = [t for t in self.tensors if tuple(t.values.shape) == (size,)]
        most = max(MAX_GAINS, _VECTORS_PER_GAIN * len(set(self._stream.gains.values())))
        if not vectors or len(vectors) > most:
            return
        gains = np.stack([np.ones(size), *(t.values.double().numpy() for t in vectors)])
        scores: dict[str, Floats] = {}
        for layer in self.stage.attentions:
            gain, pair = self._stream.gains.get(layer.value.weight), self.pairs.get(layer.value_output)
            if gain is not None and pair is not None:
                heads = self.aligner.heads[layer.value_output]
                targets = head_targets(heads, spread(size, HEAD_ROWS))
                products = np.matmul(pair.outputs, self._with_gains(pair.values, gains, heads.sketch))
                scores[gain] = scores.get(gain, 0.0) + similarities(products, [targets])[:, 0]
        for weight, order in self.orders.items():
            gain, neurons = self._stream.gains.get(weight), self.aligner.neurons.layers[weight]
            if gain is not None:
                chosen = spread(len(order), _NEURONS)
                matrix = self.chosen[weight].double().numpy()[np.maximum(order[chosen], 0)]
                rows = unit_vectors(self._with_gains(matrix, gains, neurons.sketch))
                scores[gain] = scores.get(gain, 0.0) + (rows * neurons.directions[chosen]).sum(2).mean(1)
        for gain, values in scores.items():
            best = int(quantized(values).argmax())
            if best > 0 and self.shapes.get(gain) == (size,):
                self.chosen[gain] = vectors[best - 1].values

    def _with_gains(self, matrix: Floats, gains: Floats, sketch: Floats) -> Floats:
        """Return the sketches of rows under each gain, [gains, rows, s]."""
        self.work.use(gains.size * len(matrix) * sketch.shape[1] // MATRIX_SPEED)
        projection = self._projection(sketch.shape[1])
        return np.stack([(matrix * gain) @ projection for gain in gains])

    def _linear(self, names: frozenset[str]) -> Iterator[list[ReferenceLayer]]:
        """Yield W0's linear layers of these names that have one shape and sketches of one size."""
        groups: dict[tuple[object, ...], list[ReferenceLayer]] = {}
        for name, layer in self.aligner.neurons.layers.items():
            if name in names and len(layer.shape) == 2 and layer.groups == 1:
                groups.setdefault((layer.shape, layer.sketch.shape), []).append(layer)
        yield from groups.values()
