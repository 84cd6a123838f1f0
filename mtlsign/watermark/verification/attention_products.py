"""Products of attention matrices, which no change inside a head can move.

Of a head with matrices Q, K, V [head size, d] and O [d, head size], Q and K can be replaced by A·Q and
A⁻ᵀ·K, V and O by B·V and O·B⁻¹, for all invertible A and B. The products Qᵀ·K and O·V remain, and they
determine what the head computes. Layers after a norm are read with its gain, because the gain can be moved
into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlsign.models.attention_layers import AttentionLayer, MatrixRows
from mtlsign.models.residual_stream import ResidualStream
from mtlsign.watermark.verification.model import Weights, rounded


@dataclass(frozen=True)
class AttentionProducts:
    """From the matrices of a transformer to the kernels that are read.

    Attributes:
        stream: residual stream of the architecture.
        bases: key of the products of queries and keys -> response basis, [d, k].
        head_sizes: name of an attention layer -> numbers of one head.
    """

    stream: ResidualStream
    bases: Mapping[str, Tensor]
    head_sizes: Mapping[str, int]

    @classmethod
    def of(
        cls, stream: ResidualStream, bases: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> AttentionProducts:
        """Return the products of an architecture.

        Args:
            stream: its residual stream.
            bases: response bases [1, d, k] by key of the layer, also of other layers.
            parameters: of the network, by name.
        """
        keys = [layer.query_key for layer in stream.attentions]
        sizes = {
            layer.module: parameters[layer.output].shape[1] // layer.heads for layer in stream.attentions
        }
        return cls(stream, {key: bases[key][0].double() for key in keys if key in bases}, sizes)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of all products of W0 by name."""
        shapes = {}
        for layer in self.stream.attentions:
            size = self.stream.size_of(layer)
            if layer.query_key in self.bases:
                shapes[layer.query_key] = (layer.heads * self.bases[layer.query_key].shape[1], size)
            shapes[layer.value_output] = (layer.heads * size, size)
        return shapes

    def apply(self, kernels: Weights) -> dict[str, Tensor]:
        """Normalise the matrices, and replace those of attention layers by their products.

        Args:
            kernels: matrices and gains by name; some may be missing, and heads may be more or fewer.

        Returns:
            Kernels by name without gains; products in float64, or in training in the kernels' type. Products
            [heads * k, d] of queries and keys, with the queries in the directions of the basis, and
            [heads * d, d] of values and outputs. Those of layers whose sizes do not fit are left out.
        """
        return self.multiplied(self.normalized(kernels))

    def multiplied(self, matrices: Weights) -> dict[str, Tensor]:
        """Replace the normalised matrices of attention layers by their products; see `apply`."""
        inner = self.stream.attention_weights
        result = {name: kernel for name, kernel in matrices.items() if name not in inner}
        for layer in self.stream.attentions:
            result |= self.of_layer(layer, matrices)
        return result

    def normalized(self, kernels: Weights) -> dict[str, Tensor]:
        """Multiply gains into the matrices after their norms; a gain may be absent.

        Where norms subtract the mean of each vector, so do the matrices that write the stream. In a network
        with stages the readers subtract the mean of their columns, which no input of theirs excites.
        """
        gains = set(self.stream.gains.values())
        matrices = {}
        for name, kernel in kernels.items():
            if name in gains:
                continue
            gain, matrix = kernels.get(self.stream.gains.get(name, "")), _computed(kernel)
            if gain is not None and gain.shape == kernel.shape[1:]:
                matrix = matrix * gain
            if self.stream.stages and self.stream.subtracts_mean and name in self.stream.readers:
                matrix = matrix - matrix.mean(1, keepdim=True)
            if self.stream.subtracts_mean and name in self.stream.writers:
                matrix = matrix - matrix.mean(0, keepdim=True)
            matrices[name] = rounded(matrix, kernel.dtype)
        return matrices

    def of_layer(self, layer: AttentionLayer, matrices: Weights) -> dict[str, Tensor]:
        """Return the two products of one layer, as far as its normalised matrices are present and fit."""
        basis, size = self.bases.get(layer.query_key), self.head_sizes[layer.module]
        stream_size = self.stream.size_of(layer)
        if layer.output not in matrices or len(matrices[layer.output]) != stream_size:
            return {}
        output = _computed(matrices[layer.output])
        heads, rest = divmod(output.shape[1], size)
        parts = {
            name: part
            for name, rows in (("query", layer.query), ("key", layer.key), ("value", layer.value))
            if (part := _heads(rows, layer, matrices, heads, size)) is not None
            and part.shape[2] == stream_size
        }
        products = {}
        if basis is not None and "query" in parts and "key" in parts:
            turned = (parts["query"] @ basis.to(parts["query"])).transpose(1, 2)
            products[layer.query_key] = (turned @ parts["key"]).flatten(0, 1)
        if "value" in parts and not rest:
            columns = output.unflatten(1, (heads, size)).transpose(0, 1)
            products[layer.value_output] = (columns @ parts["value"]).flatten(0, 1)
        return products


def _heads(
    rows: MatrixRows, layer: AttentionLayer, matrices: Weights, heads: int, size: int
) -> Tensor | None:
    """Return one part of each query head, [heads, head size, d]; None if it is missing or does not fit."""
    matrix = matrices.get(rows.weight)
    if matrix is None:
        return None
    joint = rows.weight == layer.query.weight == layer.key.weight
    if joint:  # thirds of one matrix, also with more or fewer heads
        third, rest = divmod(len(matrix), 3)
        start = third * (rows.start // (rows.stop - rows.start))
        part = matrix[start : start + third] if not rest else matrix[:0]
    else:
        part = matrix
    own, rest = divmod(len(part), size)
    if rest or not own or heads % own:
        return None
    split: Tensor = _computed(part).unflatten(0, (own, size))
    return split.repeat_interleave(heads // own, 0)


def _computed(matrix: Tensor) -> Tensor:
    """Return a matrix in the precision of its products: float64, but in training its own."""
    return matrix if matrix.requires_grad and torch.is_grad_enabled() else matrix.double()
