"""Alignment of recurrent layers: word vectors, units, their signs, and the two directions.

These changes leave a recurrent network's function unchanged: other coordinates of the word vectors
(`EmbeddingFrame`), another order of a layer's units, the opposite sign of a unit's output, further units that
nothing reads, a unit in several equal parts, and exchanged directions for reversed texts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from mtlsign.models.recurrent_layers import (
    CANDIDATE_GATE,
    RecurrentWeight,
    gate_count,
    is_recurrent,
    weight_place,
)
from mtlsign.models.taps import tapped_layers
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices, best_assignment
from mtlsign.watermark.verification.alignment.layers import unit_rows
from mtlsign.watermark.verification.alignment.result import (
    Alignment,
    SketchComparison,
    Sketched,
    layer_similarities,
    mean_similarity,
    with_random_sketches,
)
from mtlsign.watermark.verification.embedding_frame import embedding_frame
from mtlsign.watermark.verification.reference import Reference, reference_tensor
from mtlsign.watermark.verification.sketches import MAX_SKETCH_SIZE, projection_matrix

#: Most rounds in which the order of units is found from inputs and from their own outputs.
_ROUNDS = 6
#: Cosine of the input rows of two units that are parts of one.
_EQUAL = 1 - 1e-6


@dataclass(frozen=True)
class RecurrentMatrix:
    """One matrix of W0's recurrent layers.

    Attributes:
        weight: name of the matrix [gates * hidden, in].
        module: name of its module.
        place: layer, direction and inputs.
        gates: number of gates.
        fan_in: numbers of one input.
        sketch: float64 [gates * hidden, s].
    """

    weight: str
    module: str
    place: RecurrentWeight
    gates: int
    fan_in: int
    sketch: Floats

    @property
    def hidden(self) -> int:
        """Number of units."""
        return len(self.sketch) // self.gates

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix in the network."""
        return len(self.sketch), self.fan_in

    @cached_property
    def directions(self) -> Floats:
        """Sketches of unit length, [gates, hidden, s]."""
        return unit_rows(self.sketch).reshape(self.gates, self.hidden, -1)

    def cosines(self, matrix: Floats) -> Floats:
        """Compare each gate of W0's units with the same gate of a suspect's units.

        Args:
            matrix: [gates * n, in] with W0's input columns.

        Returns:
            Cosines of the sketches, [gates, hidden, n].
        """
        sketch = unit_rows(matrix @ projection_matrix(self.fan_in, self.sketch.shape[1]))
        return np.asarray(
            self.directions @ sketch.reshape(self.gates, -1, sketch.shape[1]).transpose(0, 2, 1)
        )


class RecurrentAligner(SketchComparison):
    """Alignment of suspects with the W0 of one reference, for networks with recurrent layers.

    Args:
        template_model: the architecture; its own values are never used.
        taps: module names; layers up to the last one are aligned.
        reference: W0's reference.
        sample: inputs of the network's geometry.

    Attributes:
        layers: W0's matrices by name, in the order of the layers.
        further_names: tensors that are read besides kernels: the embedding.
        further_shapes: shapes of those that no read-out reads; none.

    Raises:
        ModelError: a tap does not exist.
        ArtifactError: the reference does not fit the architecture.
    """

    further_shapes: Mapping[str, tuple[int, ...]] = {}

    def __init__(
        self, template_model: nn.Module, taps: Sequence[str], reference: Reference, sample: Tensor
    ) -> None:
        self.frame = embedding_frame(template_model, taps, sample, reference.tensors)
        self.further_names = () if self.frame is None else (self.frame.weight,)
        self.layers: dict[str, RecurrentMatrix] = {}
        for layer in tapped_layers(template_model, taps, sample):
            module = template_model.get_submodule(layer.conv)
            if is_recurrent(module) and f"{layer.key}/sketch" in reference.tensors:
                shape = tuple(module.get_parameter(layer.weight.rpartition(".")[2]).shape)
                size = min(reference.tensors[f"{layer.key}/sketch"].shape[-1], shape[1], MAX_SKETCH_SIZE)
                sketch = reference_tensor(reference, f"{layer.key}/sketch", (shape[0], size))
                place = weight_place(layer.weight.rpartition(".")[2])
                self.layers[layer.weight] = RecurrentMatrix(
                    layer.weight, layer.conv, place, gate_count(module), shape[1], sketch.double().numpy()
                )

    @property
    def resizable_names(self) -> set[str]:
        """Tensors that may have other sizes in a suspect."""
        return {*self.layers, *self.further_names}

    def renumbered(self, tensors: Mapping[str, Tensor], select: object) -> Sequence[Mapping[str, Tensor]]:
        """Return no views: only blocks of transformers get other numbers."""
        return ()

    def align(self, kernels: Mapping[str, Tensor]) -> Alignment:
        """Bring a suspect's kernels into W0's coordinates, order and signs.

        Args:
            kernels: by name, with the embedding. Those of other layers are returned unchanged. Kernels whose
                units do not fit the others are left out.
        """
        framed = kernels if self.frame is None else self.frame.apply(kernels)
        arrays = {
            name: k.detach().cpu().double().numpy() for name, k in framed.items() if name in self.layers
        }
        others = {
            name: kernel
            for name, kernel in framed.items()
            if name not in self.layers and name not in self.further_names
        }
        candidates = [self._aligned(arrays)]
        exchanged = self._exchanged(arrays)
        if exchanged is not None:
            candidates.append(self._aligned(exchanged))
        aligned = max(candidates, key=self._similarity)  # the first of equal ones
        tensors = {name: torch.from_numpy(array).float() for name, array in aligned.items()}
        similarities = layer_similarities(self.layers, tensors)
        return Alignment({**others, **tensors}, mean_similarity(similarities), similarities)

    @property
    def compared_layers(self) -> Mapping[str, Sketched]:
        """W0's layers with a sketch, by name of the kernel."""
        return self.layers

    def control(self) -> Self:
        """Return the same alignment with random sketches, which shows what search alone reaches."""
        control = copy.copy(self)
        control.layers = with_random_sketches(self.layers)
        return control

    def _similarity(self, aligned: Mapping[str, Floats]) -> float:
        """Return the mean cosine of the rows' sketches over the matrices that are present."""
        tensors = {name: torch.from_numpy(array) for name, array in aligned.items()}
        return mean_similarity(layer_similarities(self.layers, tensors))

    def _exchanged(self, arrays: Mapping[str, Floats]) -> dict[str, Floats] | None:
        """Return the matrices with exchanged directions; None for networks of one direction."""
        if not any(name.endswith("_reverse") for name in self.layers):
            return None
        exchanged = {}
        for name, array in arrays.items():
            other = name.removesuffix("_reverse") if name.endswith("_reverse") else f"{name}_reverse"
            place = self.layers[name].place
            if place.layer and not place.reads_outputs and array.shape[1] % 2 == 0:
                array = np.roll(array, array.shape[1] // 2, 1)
            exchanged[other] = array
        return exchanged

    def _aligned(self, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
        """Order the units of one layer after the other; each gives the columns of the next."""
        aligned: dict[str, Floats] = {}
        columns: dict[tuple[str, int], list[Floats]] = {}
        for name, matrix in self.layers.items():
            if matrix.place.reads_outputs or name not in arrays:
                continue
            inputs = arrays[name]
            if matrix.place.layer:
                changes = columns.get((matrix.module, matrix.place.layer - 1), [])
                if sum(len(change) for change in changes) != inputs.shape[1]:
                    continue
                inputs = inputs @ block_diagonal(changes)
            if inputs.shape[1] != matrix.fan_in or len(inputs) % matrix.gates:
                continue
            outputs_name = name.replace("weight_ih", "weight_hh")
            units = RecurrentUnits(matrix, self.layers.get(outputs_name), inputs, arrays.get(outputs_name))
            aligned |= units.matrices()
            columns.setdefault((matrix.module, matrix.place.layer), []).append(units.column_change())
        return aligned


class RecurrentUnits:
    """Units of one direction of one layer: their order and signs."""

    def __init__(
        self,
        inputs: RecurrentMatrix,
        outputs: RecurrentMatrix | None,
        input_matrix: Floats,
        output_matrix: Floats | None,
    ) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._input_matrix = input_matrix
        count = len(input_matrix) // inputs.gates
        fits = output_matrix is not None and output_matrix.shape == (len(input_matrix), count)
        self._output_matrix = output_matrix if fits and outputs is not None else None
        self._merge = _merging(input_matrix.reshape(inputs.gates, count, -1))
        self._order, self._signs = self._search()

    def matrices(self) -> dict[str, Floats]:
        """Return the matrices with W0's units, signs and columns; missing units are zeros."""
        result = {self._inputs.weight: self._in_order(self._input_matrix)}
        if self._outputs is not None and self._output_matrix is not None:
            result[self._outputs.weight] = self._in_order(self._output_matrix @ self.column_change())
        return result

    def column_change(self) -> Floats:
        """Return the matrix that brings columns of this layer's outputs into W0's order, [n, hidden]."""
        present = self._order >= 0
        change = self._merge[:, np.maximum(self._order, 0)] * (self._signs * present)
        return np.asarray(change, dtype=np.float64)

    def _search(self) -> tuple[Indices, Floats]:
        """Return the suspect's unit for each of W0's, −1 for none, and its sign."""
        from_inputs = self._inputs.cosines(self._input_matrix)
        order, signs = units_in_order(from_inputs)
        if self._outputs is None or self._output_matrix is None:
            return order, signs
        for _ in range(_ROUNDS):
            self._order, self._signs = order, signs
            cosines = from_inputs + self._outputs.cosines(self._output_matrix @ self.column_change())
            order, signs = units_in_order(cosines)
            if np.array_equal(order, self._order) and np.array_equal(signs, self._signs):
                break
        return order, signs

    def _in_order(self, matrix: Floats) -> Floats:
        """Return the rows of all gates in W0's order, with the sign of the candidate gate."""
        gates = self._inputs.gates
        rows = matrix.reshape(gates, -1, matrix.shape[1])[:, np.maximum(self._order, 0)]
        rows = rows * (self._order >= 0)[None, :, None]
        rows[CANDIDATE_GATE] *= self._signs[:, None]
        return np.ascontiguousarray(rows.reshape(-1, matrix.shape[1]))


def units_in_order(cosines: Floats) -> tuple[Indices, Floats]:
    """Return the best order of units and their signs from the cosines of all gates [gates, hidden, n]."""
    candidate = cosines[CANDIDATE_GATE]
    total = np.abs(candidate) + np.delete(cosines, CANDIDATE_GATE, 0).sum(0)
    order = best_assignment(total)
    matched = candidate[np.arange(len(order)), np.maximum(order, 0)]
    return order, np.where(matched < 0, -1.0, 1.0)


def _merging(gates: Floats) -> Floats:
    """Return the matrix [n, n] that adds the columns of equal units, up to sign, to that of the first."""
    count = gates.shape[1]
    candidate = gates[CANDIDATE_GATE]
    plain = np.delete(gates, CANDIDATE_GATE, 0)
    products = np.einsum("gic,gjc->ij", plain, plain)
    signed = candidate @ candidate.T
    total = products + np.abs(signed)
    norms = np.maximum(np.diag(total), 1e-300)
    equal = total >= _EQUAL * np.maximum(norms[:, None], norms[None, :])
    merge = np.zeros((count, count))
    for unit in range(count):
        first = int(np.argmax(equal[unit])) if norms[unit] > 1e-300 else unit
        merge[unit, first] = 1.0 if first == unit or signed[unit, first] >= 0 else -1.0
    return merge


def block_diagonal(blocks: Sequence[Floats]) -> Floats:
    """Return the blocks along the diagonal of one matrix."""
    result = np.zeros((sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks)))
    row = column = 0
    for block in blocks:
        result[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return result
