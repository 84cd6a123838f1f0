"""Layers of W0 as the reference describes them, and a suspect's kernels of these layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from mtlsign.models.channel_sets import ChannelStructure
from mtlsign.models.linear_channels import LinearProduct
from mtlsign.models.taps import TappedLayer, tapped_layers
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices
from mtlsign.watermark.verification.reference import Reference, reference_tensor
from mtlsign.watermark.verification.sketches import MAX_SKETCH_SIZE, projection_matrix

#: A sketch of this size has weight 1 among those of other layers.
_FULL_SIZE = 16
#: Input columns of a network's own channels, as numbers of a set.
NO_SET = -1


@dataclass(frozen=True)
class ReferenceLayer:
    """One layer of W0.

    Attributes:
        weight: name of the kernel.
        shape: of the kernel in the network, [O, I/groups, ...].
        groups: the convolution's groups.
        window: height and width of the kernel, or of the positions that were flattened for a linear layer.
        sketch: float64 [O, s].
        columns: W0's column norms, float64 [groups, I/groups].
        free_signs: whether a batch norm follows, which makes the signs of rows free.
        row_sets: set of each row, int64 [O]; −1 without one.
        row_channels: number of each row within its set.
        column_sets: set of each input column over all groups, int64 [I].
        column_channels: number of each input column within its set.
        reads_inputs: whether the input columns are the channels of the network's inputs.
        rank: rank of the kernel if it is a product; 0 otherwise.
    """

    weight: str
    shape: tuple[int, ...]
    groups: int
    window: tuple[int, int]
    sketch: Floats
    columns: Floats
    free_signs: bool
    row_sets: Indices
    row_channels: Indices
    column_sets: Indices
    column_channels: Indices
    reads_inputs: bool
    rank: int = 0

    @cached_property
    def projection(self) -> Floats:
        """Matrix of the sketch, [I/groups, positions, s]."""
        fan_in = int(np.prod(self.shape[1:]))
        matrix = projection_matrix(fan_in, self.sketch.shape[1])
        return matrix.reshape(-1, self.positions, self.sketch.shape[1])

    @cached_property
    def back_projection(self) -> Floats:
        """Matrix that estimates a row from its sketch, [I/groups, positions, s]."""
        flat = self.projection.reshape(-1, self.sketch.shape[1])
        back: Floats = flat
        if 2 * flat.shape[1] >= flat.shape[0]:
            back = np.asarray(np.linalg.pinv(flat).T, dtype=np.float64)
        return back.reshape(self.projection.shape)

    @cached_property
    def directions(self) -> Floats:
        """Sketches of unit length, [O, s]; zero rows stay zero."""
        return unit_rows(self.sketch)

    @property
    def positions(self) -> int:
        """Number of positions of the window."""
        return self.window[0] * self.window[1]

    @property
    def weighting(self) -> float:
        """Weight of the rows' similarities: the inverse of their variance for unrelated channels.

        The rows of a product of rank d are in d dimensions, which adds 1/d to the variance 1/s.
        """
        size = self.sketch.shape[1]
        return float((size * self.rank / (size + self.rank) if self.rank else size) / _FULL_SIZE)

    def column_weighting(self, similarity: Floats) -> float:
        """Return the weight of the columns' similarities [channels, channels'].

        The noise of a product's columns depends on its singular values. It is measured: nearly all pairs of
        channels are unrelated, and a constant of a row or column has no influence on an assignment.
        """
        if not self.rank:
            return self.weighting
        centred = similarity - similarity.mean(0) - similarity.mean(1, keepdims=True) + similarity.mean()
        variance = max(float(np.square(centred).mean()), 1e-300)
        signal = len(self.sketch) / self.columns.size
        return float(min(self.sketch.shape[1], signal / variance) / _FULL_SIZE)

    @property
    def is_depthwise(self) -> bool:
        """True if each row reads the channel with the row's number."""
        return self.groups > 1 and self.groups == self.shape[0] and self.shape[1] == 1

    def sets_of_columns(self) -> list[int]:
        """Return the sets that the input columns belong to."""
        return sorted({int(x) for x in self.column_sets} - {NO_SET})

    def sets_of_rows(self) -> list[int]:
        """Return the sets that the rows belong to."""
        return sorted({int(x) for x in self.row_sets} - {NO_SET})


def unit_rows(rows: Floats) -> Floats:
    """Return rows of unit length; zero rows stay zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Floats = rows / np.where(norms > 0, norms, 1.0)
    return unit


def reference_layers(
    template_model: nn.Module,
    taps: Sequence[str],
    sample: Tensor,
    reference: Reference,
    structure: ChannelStructure,
    *,
    products: Sequence[LinearProduct] = (),
    exceptions: Collection[str] = (),
) -> dict[str, ReferenceLayer]:
    """Return the layers that have a sketch, by name of the kernel, in execution order.

    Args:
        template_model: the architecture.
        taps: module names.
        sample: one batch of the carrier's geometry.
        reference: W0's reference.
        structure: channels of the architecture.
        products: across linear channels. They are layers in the place of the kernels that read the channels;
            their kernels are no layers, because a mix of the channels changes them.
        exceptions: kernels of products that are layers as well.

    Raises:
        ArtifactError: the reference does not fit the architecture.
    """
    replaced = {name for product in products for name in product.weights} - set(exceptions)
    crossing = {product.weights[0]: product for product in products}
    layers = {}
    for layer in tapped_layers(template_model, taps, sample):
        sketched = layer.kind != "other" and f"{layer.conv}/sketch" in reference.tensors
        if sketched and layer.weight not in replaced:
            module = template_model.get_submodule(layer.conv)
            layers[layer.weight] = _reference_layer(layer, module, reference, structure)
        if layer.weight in crossing:
            product = crossing[layer.weight]
            layers[product.name] = _layer_of_product(product, reference, structure)
    return layers


def _reference_layer(
    layer: TappedLayer,
    module: nn.Module,
    reference: Reference,
    structure: ChannelStructure,
) -> ReferenceLayer:
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape, groups = tuple(weight.shape), int(getattr(module, "groups", 1))
    sketch, columns = _described(layer.conv, shape, groups, reference)
    window = _window(shape)
    positions = _flattened_positions(layer.weight, structure) if len(shape) == 2 else 1
    if positions > 1:  # flattened positions are the kernel's window
        side = round(positions**0.5)
        window = (side, side) if side * side == positions else (1, positions)
        columns = np.sqrt(np.square(columns).reshape(1, -1, positions).mean(2))
    return ReferenceLayer(
        layer.weight, shape, groups, window, sketch, columns, layer.batch_norm is not None,
        *_row_places(layer.weight, shape[0], structure),
        *_column_places(layer.weight, columns.size, positions, structure),
        reads_inputs=layer.weight in structure.input_kernels and groups == 1,
    )  # fmt: skip


def _layer_of_product(
    product: LinearProduct, reference: Reference, structure: ChannelStructure
) -> ReferenceLayer:
    """Return a product as a layer: the rows of one of its kernels, and the columns of the other."""
    reading, writing = product.weights
    sketch, columns = _described(product.name, product.shape, 1, reference)
    return ReferenceLayer(
        product.name, product.shape, 1, _window(product.shape), sketch, columns,
        product.reader_norm is not None,
        *_row_places(reading, product.shape[0], structure),
        *_column_places(writing, columns.size, 1, structure),
        reads_inputs=writing in structure.input_kernels,
        rank=product.channels,
    )  # fmt: skip


def _described(key: str, shape: tuple[int, ...], groups: int, reference: Reference) -> tuple[Floats, Floats]:
    """Return sketch [O, s] and column norms [groups, I/groups] of a layer."""
    size = min(reference.tensors[f"{key}/sketch"].shape[-1], int(np.prod(shape[1:])), MAX_SKETCH_SIZE)
    sketch = reference_tensor(reference, f"{key}/sketch", (shape[0], size)).double().numpy()
    columns = reference_tensor(reference, f"{key}/columns", (groups, shape[1])).double().numpy()
    return sketch, columns


def _window(shape: tuple[int, ...]) -> tuple[int, int]:
    return (int(shape[2]), int(np.prod(shape[3:]))) if len(shape) > 2 else (1, 1)


def _row_places(weight: str, count: int, structure: ChannelStructure) -> tuple[Indices, Indices]:
    """Return the set of each row of a kernel, and its number within the set."""
    numbers, channels = np.full(count, NO_SET), np.zeros(count, dtype=np.int64)
    for number, members in enumerate(structure.sets):
        if weight in members.rows:
            numbers[members.rows[weight]] = number
            channels[members.rows[weight]] = np.arange(members.size)
    return numbers, channels


def _column_places(
    weight: str, count: int, positions: int, structure: ChannelStructure
) -> tuple[Indices, Indices]:
    """Return the set of each input column of a kernel, and its number within the set."""
    numbers, channels = np.full(count, NO_SET), np.zeros(count, dtype=np.int64)
    for number, members in enumerate(structure.sets):
        places = members.columns.get(weight)
        if places is not None and places.shape[1] == positions:
            numbers[places[:, 0] // positions] = number
            channels[places[:, 0] // positions] = np.arange(members.size)
    return numbers, channels


def _flattened_positions(weight: str, structure: ChannelStructure) -> int:
    """Return the number of neighbouring columns that belong to each channel; 1 if it differs."""
    counts = set()
    for members in structure.sets:
        places = members.columns.get(weight)
        if places is not None:
            runs = places[:, :1] + np.arange(places.shape[1])
            aligned = np.array_equal(places, runs) and not (places[:, 0] % places.shape[1]).any()
            counts.add(places.shape[1] if aligned else 0)
    return counts.pop() if len(counts) == 1 and 0 not in counts else 1
