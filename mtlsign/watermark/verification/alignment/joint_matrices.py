"""Joint matrices of attention layers that hold queries, keys and values in another order than W0's.

Files keep such a matrix as three parts, or head by head, and the parts in any order. All head sizes are W0's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mtlsign.models.attention_layers import AttentionLayer
from mtlsign.watermark.verification.alignment.assignment import RESOLUTION
from mtlsign.watermark.verification.alignment.result import SURE_COSINE, recognition_margin
from mtlsign.watermark.verification.attention_products import AttentionProducts

if TYPE_CHECKING:  # alignment.transformer imports this module
    from mtlsign.watermark.verification.alignment.transformer import HeadProducts


@dataclass(frozen=True)
class PartOrder:
    """Places of queries, keys and values in a joint matrix.

    Attributes:
        places: places of the three among the parts.
        by_head: whether the three parts of a head follow each other, and not all queries, keys or values.
    """

    places: tuple[int, int, int]
    by_head: bool

    def in_thirds(self, matrix: Tensor, size: int) -> Tensor:
        """Return the matrix with all queries, then all keys, then all values.

        Args:
            matrix: [3 * heads * size, columns], or a vector of such a length; others are returned unchanged.
            size: rows of a head.
        """
        if len(matrix) % (3 * size) or self == PartOrder((0, 1, 2), by_head=False):
            return matrix
        if self.by_head:
            parts = matrix.unflatten(0, (-1, 3, size)).transpose(0, 1)
        else:
            parts = matrix.unflatten(0, (3, -1, size))
        thirds: Tensor = parts[list(self.places)].flatten(0, 2)
        return thirds

    def stored(self, matrix: Tensor, size: int) -> Tensor:
        """Return the matrix in this order, from all queries, keys and values; the inverse of `in_thirds`."""
        inverse = [self.places.index(place) for place in range(3)]
        parts = matrix.unflatten(0, (3, -1, size))[inverse]
        stored: Tensor = (parts.transpose(0, 1) if self.by_head else parts).flatten(0, 2)
        return stored


#: Orders with each place of the values; queries come before keys.
VALUE_ORDERS = tuple(
    PartOrder(places, by_head) for by_head in (False, True) for places in ((0, 1, 2), (0, 2, 1), (1, 2, 0))
)
_EXCHANGED = PartOrder((1, 0, 2), by_head=False)


class JointMatrices:
    """Order of the parts of a suspect's joint matrices, by the sketches of W0's heads.

    Args:
        products: how the kernels of attention layers are made.
        heads: W0's heads by name of their products.
    """

    def __init__(self, products: AttentionProducts, heads: Mapping[str, HeadProducts]) -> None:
        self._products, self._heads = products, heads

    def are_doubtful(self, similarities: Mapping[str, float]) -> bool:
        """Return whether the similarity of a layer with a joint matrix does not show its order.

        Args:
            similarities: mean cosines of the aligned layers by name of their products.
        """
        joint = [layer for layer in self._products.stream.attentions if is_joint(layer)]
        names = [name for layer in joint for name in (layer.query_key, layer.value_output)]
        return any(similarities.get(name, 0.0) <= SURE_COSINE for name in names if name in self._heads)

    def ordered(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return normalised matrices with W0's order of parts, in the coordinates of W0's stream.

        The own order stays if a cosine over `SURE_COSINE` shows it, or if no other order is clearly better.
        """
        result = dict(matrices)
        for layer in self._products.stream.attentions:
            if is_joint(layer) and layer.query.weight in result and layer.output in result:
                self._choose(layer, layer.value_output, result, VALUE_ORDERS)
                self._choose(layer, layer.query_key, result, (VALUE_ORDERS[0], _EXCHANGED))
        return result

    def value_products(
        self, layer: AttentionLayer, matrices: Mapping[str, Tensor], orders: Sequence[PartOrder]
    ) -> Iterator[Tensor]:
        """Yield the products of values and outputs under each order of a joint matrix, once for others."""
        name, size = layer.query.weight, self._products.head_sizes[layer.module]
        has_orders = is_joint(layer) and name in matrices
        for order in orders if has_orders else orders[:1]:
            view = {**matrices, name: order.in_thirds(matrices[name], size)} if has_orders else matrices
            product = self._products.of_layer(layer, view).get(layer.value_output)
            if product is not None:
                yield product

    def _choose(
        self, layer: AttentionLayer, product: str, matrices: dict[str, Tensor], orders: tuple[PartOrder, ...]
    ) -> None:
        """Put the most similar order of a layer's joint matrix into the matrices."""
        heads, name = self._heads.get(product), layer.query.weight
        if heads is None:
            return
        own, size = matrices[name], self._products.head_sizes[layer.module]
        best, margin = self._similarity(layer, product, matrices), recognition_margin([heads.sketch])
        if best > SURE_COSINE:
            return
        best += margin
        for order in orders[1:]:
            matrix = order.in_thirds(own, size)
            similarity = self._similarity(layer, product, {**matrices, name: matrix})
            if similarity > best + RESOLUTION:
                best, matrices[name] = similarity, matrix

    def _similarity(self, layer: AttentionLayer, product: str, matrices: Mapping[str, Tensor]) -> float:
        """Return the mean cosine of W0's heads with the most similar heads of a suspect; 0 if unreadable."""
        heads, kernel = self._heads[product], self._products.of_layer(layer, matrices).get(product)
        if kernel is None or len(kernel) % heads.rows:
            return 0.0
        return float(heads.similarities(kernel.numpy()).max(1).mean())


def is_joint(layer: AttentionLayer) -> bool:
    """Return whether queries, keys and values are parts of one matrix."""
    return layer.query.weight == layer.key.weight == layer.value.weight
