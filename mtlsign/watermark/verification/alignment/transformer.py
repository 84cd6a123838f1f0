"""Alignment of transformers: the coordinates of the stream, neurons of MLPs, and heads.

These changes leave a transformer's function unchanged: another basis of the residual stream, another order of
the vocabulary, gains moved into the matrices after them, another order of neurons and heads, and any
invertible change inside a head. The frame of the stream undoes the first two, the products of attention
layers the gains and the changes inside heads; neurons and heads are ordered by their sketches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from mtlsign.models.stream_stages import StreamStage
from mtlsign.models.tensor_names import MAX_MAPPINGS
from mtlsign.models.untrusted import MappedTensors
from mtlsign.watermark.verification.alignment.aligner import Aligner
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices, best_assignment
from mtlsign.watermark.verification.alignment.blocks import (
    BlockGroup,
    BlockNames,
    RenumberedTensors,
    block_groups,
    new_numbers,
    too_many_places,
    windows,
)
from mtlsign.watermark.verification.alignment.joint_matrices import VALUE_ORDERS, JointMatrices
from mtlsign.watermark.verification.alignment.layers import ReferenceLayer, unit_rows
from mtlsign.watermark.verification.alignment.result import (
    SURE_COSINE,
    Alignment,
    SketchComparison,
    Sketched,
    layer_similarities,
    mean_similarity,
    with_random_sketches,
)
from mtlsign.watermark.verification.alignment.stream_frame import StreamFrame
from mtlsign.watermark.verification.attention_products import AttentionProducts
from mtlsign.watermark.verification.reference import Reference, reference_tensor
from mtlsign.watermark.verification.sketches import MAX_SKETCH_SIZE, projection_matrix


@dataclass(frozen=True)
class HeadProducts:
    """Products of W0's heads in one attention layer.

    Attributes:
        heads: number of heads.
        size: numbers of one vector of the stream.
        sketch: float64 [heads * rows of a head, s].
    """

    heads: int
    size: int
    sketch: Floats

    @property
    def rows(self) -> int:
        """Number of rows of one head."""
        return len(self.sketch) // self.heads

    def sketches(self, kernel: Floats) -> Floats:
        """Return the sketches of a suspect's heads, of unit rows: [heads, rows, s]."""
        projected = unit_rows(kernel @ projection_matrix(self.size, self.sketch.shape[1]))
        return projected.reshape(-1, self.rows, self.sketch.shape[1])

    def similarities(self, kernel: Floats) -> Floats:
        """Compare W0's heads with a suspect's: mean cosines of their rows, [heads, heads']."""
        own = unit_rows(self.sketch).reshape(self.heads, self.rows, -1)
        products: Floats = np.einsum("hrs,grs->hg", own, self.sketches(kernel), optimize=True)
        return products / self.rows


class TransformerAligner(SketchComparison):
    """Alignment of suspects with the W0 of one reference, for networks with attention layers.

    Args:
        template_model: the architecture; its own values are never used.
        taps: module names; layers up to the last one are aligned.
        reference: W0's reference.
        sample: one batch of the network's inputs.
        products: how the kernels of attention layers are made.

    Attributes:
        layers: W0's layers by name of the kernel: neurons of MLPs, and heads.
        products: how the kernels of attention layers are made.
        heads: heads of attention layers by name of their products.
        further_names: tensors that are read besides matrices: gains, and sources of the stream.
        further_shapes: shapes of the sources.
        resizable_names: tensors that may have other sizes in a suspect.

    Raises:
        ModelError: a tap does not exist.
        ArtifactError: the reference does not fit the architecture.
    """

    def __init__(
        self,
        template_model: nn.Module,
        taps: Sequence[str],
        reference: Reference,
        sample: Tensor,
        products: AttentionProducts,
    ) -> None:
        self.products = products
        ordered = [n for stage in products.stream.stages for n in (*stage.sources, *stage.writers)]
        self.neurons = Aligner(template_model, taps, reference, sample, ordered_kernels=ordered)
        self.frame = StreamFrame.of(template_model, products.stream, reference.tensors)
        self.heads = {
            name: HeadProducts(heads, products.shapes[name][1], sketch)
            for name, (heads, sketch) in _head_sketches(products, reference).items()
        }
        self.further_shapes = dict(self.frame.shapes)
        self.further_names = (*self.frame.shapes, *products.stream.gains.values())
        self.resizable_names = {
            *self.neurons.layers,
            *products.stream.attention_weights,
            *self.frame.shapes,
        }

    @property
    def _joint(self) -> JointMatrices:
        return JointMatrices(self.products, self.heads)

    @property
    def layers(self) -> Mapping[str, HeadProducts | ReferenceLayer]:
        """W0's layers by name of the kernel."""
        return {**self.neurons.layers, **self.heads}

    def align(self, kernels: Mapping[str, Tensor]) -> Alignment:
        """Bring a suspect's matrices into W0's coordinates and order.

        Args:
            kernels: matrices, gains and sources of the stream by name. Matrices of other layers are returned
                unchanged, those whose neurons do not fit are left out.
        """
        matrices = self.frame.apply(self.products.normalized(kernels))
        inner = self.products.stream.attention_weights
        neurons = self.neurons.align({n: m for n, m in matrices.items() if n not in inner})
        attention = {name: matrix for name, matrix in matrices.items() if name in inner}
        alignment = self._aligned(neurons.kernels, attention)
        if self._joint.are_doubtful(alignment.layer_similarities):
            alignment = self._aligned(neurons.kernels, self._joint.ordered(attention))
        return alignment

    def _aligned(self, neurons: Mapping[str, Tensor], attention: Mapping[str, Tensor]) -> Alignment:
        """Return the alignment with the matrices of attention layers in the coordinates of W0's stream."""
        ordered = self._ordered_heads(self.products.multiplied({**neurons, **attention}))
        shapes = self.products.shapes  # without a sketch, further heads stay
        aligned = {name: k for name, k in ordered.items() if tuple(k.shape) == shapes.get(name, k.shape)}
        similarities = layer_similarities(self.layers, aligned)
        return Alignment(aligned, mean_similarity(similarities), similarities)

    @property
    def compared_layers(self) -> Mapping[str, Sketched]:
        """W0's layers with a sketch, by name of the kernel."""
        return self.layers

    def control(self) -> Self:
        """Return the same alignment with random sketches, which shows what search alone reaches."""
        control = copy.copy(self)
        control.heads = with_random_sketches(self.heads)
        control.neurons = copy.copy(self.neurons)
        control.neurons.layers = with_random_sketches(self.neurons.layers)
        return control

    def renumbered(
        self,
        tensors: Mapping[str, Tensor],
        select: Callable[[Mapping[str, Tensor]], Iterable[MappedTensors]],
        *,
        own_numbers: bool = False,
    ) -> Iterator[Mapping[str, Tensor]]:
        """Yield views of a file with W0's numbers of blocks, if it has others.

        Args:
            tensors: of the file.
            select: selects the tensors of the architecture in each place of a view.
            own_numbers: whether to look for exchanged blocks among just W0's numbers instead.

        Raises:
            ModelError: the file has blocks with other numbers in more than `MAX_MAPPINGS` places.
        """
        views = [tensors]
        for stage in self.products.stream.parts:
            blocks = BlockNames.of(stage.attentions)
            if blocks is None:
                continue
            renumbered: list[Mapping[str, Tensor]] = []
            for view in views:
                groups = block_groups(view, blocks, own_numbers=own_numbers)
                renumbered += self._renumbered_stage(view, groups, blocks, stage, select) or [view]
                if len(renumbered) > MAX_MAPPINGS:  # before the work for the next view
                    raise too_many_places()
            views = renumbered
        yield from (view for view in views if view is not tensors)

    def _renumbered_stage(
        self,
        tensors: Mapping[str, Tensor],
        groups: Sequence[BlockGroup],
        blocks: BlockNames,
        stage: StreamStage,
        select: Callable[[Mapping[str, Tensor]], Iterable[MappedTensors]],
    ) -> list[Mapping[str, Tensor]]:
        """Return views of a file with W0's numbers of one stage's blocks, one for each place."""
        views: list[Mapping[str, Tensor]] = []
        for group in groups:
            numbers = group.numbers
            similarities = np.zeros((blocks.count, len(numbers)))
            for window in windows(numbers, blocks.count):
                for selected in select(RenumberedTensors(tensors, group, window)):
                    columns = [numbers.index(number) for number in window]
                    own = self._block_similarities(selected.tensors, stage)[:, : len(columns)]
                    similarities[:, columns] = np.maximum(similarities[:, columns], own)
            if similarities.any():  # otherwise no block can be read
                views.append(RenumberedTensors(tensors, group, new_numbers(similarities, numbers)))
        return views

    def _block_similarities(self, kernels: Mapping[str, Tensor], stage: StreamStage) -> Floats:
        """Compare the heads of W0's blocks with those of a suspect's: [blocks, blocks]; 0 for missing ones.

        The bases of queries differ between blocks, so that only values and outputs are compared.
        """
        turned = self.frame.apply(self.products.normalized(kernels))
        count = len(stage.attentions)
        similarities = np.zeros((count, count))
        targets = [self.heads.get(layer.value_output) for layer in stage.attentions]
        for column, attention in enumerate(stage.attentions):
            for kernel in self._joint.value_products(attention, turned, VALUE_ORDERS):
                for row, heads in enumerate(targets):
                    if heads is not None and len(kernel) % heads.rows == 0:
                        own = heads.similarities(kernel.numpy()).max(1).mean()
                        similarities[row, column] = max(own, similarities[row, column])
                if similarities[:, column].max() > SURE_COSINE:
                    break
        return similarities

    def _ordered_heads(self, kernels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring the heads of every attention layer into W0's order; missing heads are zeros."""
        ordered = dict(kernels)
        for layer in self.products.stream.attentions:
            names = [n for n in (layer.query_key, layer.value_output) if n in ordered and n in self.heads]
            similarities = [self.heads[name].similarities(ordered[name].numpy()) for name in names]
            if not similarities or len({similarity.shape for similarity in similarities}) > 1:
                continue
            order = best_assignment(np.sum(similarities, 0))
            for name in names:
                ordered[name] = _selected_heads(ordered[name], order, self.heads[name].rows)
        return ordered


def _head_sketches(products: AttentionProducts, reference: Reference) -> dict[str, tuple[int, Floats]]:
    """Return number of heads and sketch by name of the products."""
    heads = {
        name: layer.heads
        for layer in products.stream.attentions
        for name in (layer.query_key, layer.value_output)
    }
    sketches = {}
    for name, (rows, size) in products.shapes.items():
        stored = reference.tensors.get(f"{name}/sketch")
        if stored is not None:
            shape = (rows, min(stored.shape[-1], size, MAX_SKETCH_SIZE))
            sketches[name] = (
                heads[name],
                reference_tensor(reference, f"{name}/sketch", shape).double().numpy(),
            )
    return sketches


def _selected_heads(kernel: Tensor, order: Indices, rows: int) -> Tensor:
    """Return the heads of a kernel in another order; −1 gives zeros."""
    heads = kernel.unflatten(0, (-1, rows))
    chosen = torch.from_numpy(np.maximum(order, 0)).long()
    present = torch.from_numpy(np.asarray(order) >= 0).to(kernel.dtype)
    selected: Tensor = heads[chosen] * present[:, None, None]
    return selected.flatten(0, 1)
