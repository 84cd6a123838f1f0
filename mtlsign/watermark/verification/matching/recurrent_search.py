"""Search for the matrices of recurrent layers among the tensors of a file, by the sketches of W0's layers.

The embedding whose vectors explain W0's best gives the coordinates of the inputs. Then pairs of matrices, for
the inputs and for the unit's own outputs, are compared with each direction of each layer, from the first
layer. The most similar ones are taken first. Two directions can have exchanged places in the columns of the
next layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mtlsign.models.recurrent_layers import CANDIDATE_GATE
from mtlsign.models.unnamed_tensors import FileTensor
from mtlsign.models.untrusted import MAX_GROWTH
from mtlsign.watermark.verification.alignment import RecurrentAligner
from mtlsign.watermark.verification.alignment.assignment import RESOLUTION, Floats, Indices
from mtlsign.watermark.verification.alignment.recurrent import (
    RecurrentMatrix,
    RecurrentUnits,
    block_diagonal,
    units_in_order,
)
from mtlsign.watermark.verification.embedding_frame import EmbeddingFrame
from mtlsign.watermark.verification.matching.candidates import Work
from mtlsign.watermark.verification.matching.stream_sources import (
    MATRIX_SPEED,
    likely_vocabularies,
    word_search_work,
)

#: Share of W0's vectors that no table explains, from which the words are looked for in another order.
_MISFIT = 0.5
#: Matrices for the inputs of one direction that are compared together with those for its outputs.
_FOLLOWED = 4
#: Least multiplications for the comparison of one matrix.
_MATRIX_WORK = 2**18


@dataclass(frozen=True)
class _Inputs:
    """Matrix for the inputs of one direction, and the order of its units.

    Attributes:
        tensor: of the file, with the columns as the network names them.
        array: with W0's columns, [gates * hidden, in].
        score: mean cosine of its rows.
        order: the suspect's unit for each of W0's.
        signs: of these units.
    """

    tensor: FileTensor
    array: Floats
    score: float
    order: Indices
    signs: Floats


@dataclass(frozen=True)
class _Direction:
    """Chosen matrices of one direction of one layer; `outputs` is None without any."""

    slot: RecurrentMatrix
    inputs: _Inputs
    outputs: FileTensor | None
    score: float


def find_embedding(frame: EmbeddingFrame, tensors: Sequence[FileTensor], work: Work) -> FileTensor | None:
    """Return the matrix of which W0's word vectors are a linear map; None without a candidate.

    Args:
        frame: coordinates of W0's word vectors.
        tensors: of the file; their words can have another order.
        work: limit of the multiplications.

    Raises:
        ModelError: the limit is exceeded.
    """
    candidates, known = [], len(frame.inverse)
    for tensor in tensors:
        for vectors in (tensor.values, tensor.values.T) if tensor.values.dim() == 2 else ():
            if _is_vocabulary(vectors, frame):
                work.use(_MATRIX_WORK + 20 * known * vectors.shape[1] ** 2 // MATRIX_SPEED)
                misfit = frame.words.misfit(vectors[:known].double())
                table = FileTensor(tensor.name, tensor.place, vectors, (vectors,))
                candidates.append((misfit, table, vectors))
    if min((misfit for misfit, _, _ in candidates), default=0.0) > _MISFIT:
        candidates = likely_vocabularies(candidates, frame.shape[0])
        for number, (misfit, table, vectors) in enumerate(candidates):
            work.use(word_search_work(known, vectors) // MATRIX_SPEED)
            ordered = frame.words.misfit(frame.words.find(vectors))
            candidates[number] = (min(misfit, ordered), table, vectors)
    if not candidates:
        return None
    return min(candidates, key=lambda entry: (round(entry[0] / RESOLUTION), entry[1].place))[1]


class RecurrentSearch:
    """Search for the tensors of one architecture in one file.

    Args:
        aligner: alignment with W0, or its control with random sketches.
        embedding: result of `find_embedding`.
        tensors: of the file; matrices have W0's axes.
        work: limit of the multiplications.
    """

    def __init__(
        self,
        aligner: RecurrentAligner,
        embedding: FileTensor | None,
        tensors: Sequence[FileTensor],
        work: Work,
    ) -> None:
        self._aligner, self._embedding, self._work = aligner, embedding, work
        self._tensors = [t for t in tensors if t.values.dim() == 2]
        self._chosen: dict[str, Tensor] = {}
        self._used: set[int] = set()
        self._change: Floats | None = None
        self._columns: dict[str, list[Floats]] = {}

    def run(self) -> dict[str, Tensor]:
        """Return the tensors by the network's names, as far as they are in the file.

        Raises:
            ModelError: the limit is exceeded.
        """
        frame = self._aligner.frame
        if frame is not None and self._embedding is not None:
            self._chosen[frame.weight] = self._embedding.values
            self._used.add(self._embedding.place)
            self._change = frame.change(self._embedding.values).numpy()
        for slots in self._layers():
            self._choose_layer(slots)
        return self._chosen

    def _layers(self) -> list[list[RecurrentMatrix]]:
        """Return the matrices for the inputs of all directions of each layer."""
        layers: dict[tuple[str, int], list[RecurrentMatrix]] = {}
        for matrix in self._aligner.layers.values():
            if not matrix.place.reads_outputs:
                layers.setdefault((matrix.module, matrix.place.layer), []).append(matrix)
        return list(layers.values())

    def _choose_layer(self, slots: Sequence[RecurrentMatrix]) -> None:
        """Choose the matrices of one layer, with the columns of the layer before in one of two orders."""
        first = slots[0]
        changes = self._columns.pop(first.module, []) if first.place.layer else []
        arrangements = [self._directions(slots, changes, exchanged=False)]
        if len(changes) == 2:
            arrangements.append(self._directions(slots, changes, exchanged=True))
        best = max(arrangements, key=lambda choice: round(sum(d.score for d in choice) / RESOLUTION))
        for direction in best:
            slot, inputs = direction.slot, direction.inputs
            self._chosen[slot.weight] = inputs.tensor.values
            self._used.add(inputs.tensor.place)
            name = _outputs_name(slot)
            outputs = None
            if direction.outputs is not None:
                self._chosen[name] = direction.outputs.values
                self._used.add(direction.outputs.place)
                outputs = direction.outputs.values.double().numpy()
            self._work.use(self._units_work(slot))
            units = RecurrentUnits(slot, self._aligner.layers.get(name), inputs.array, outputs)
            self._columns.setdefault(slot.module, []).append(units.column_change())
        if len(best) < len(slots):  # the next layer cannot be compared
            self._columns.pop(first.module, None)

    def _directions(
        self, slots: Sequence[RecurrentMatrix], changes: Sequence[Floats], *, exchanged: bool
    ) -> list[_Direction]:
        """Return the most similar matrices for each direction of one layer, in the order of the slots."""
        options = [option for slot in slots for option in self._options(slot, changes, exchanged=exchanged)]
        options.sort(key=lambda option: -round(option.score / RESOLUTION))
        chosen: dict[str, _Direction] = {}
        used = set(self._used)
        for option in options:
            outputs = option.outputs
            places = {option.inputs.tensor.place} | (set() if outputs is None else {outputs.place})
            if option.slot.weight not in chosen and not places & used:
                chosen[option.slot.weight] = option
                used |= places
        return [chosen[slot.weight] for slot in slots if slot.weight in chosen]

    def _options(
        self, slot: RecurrentMatrix, changes: Sequence[Floats], *, exchanged: bool
    ) -> list[_Direction]:
        """Return pairs of matrices for one direction."""
        inputs = self._inputs(slot, changes, exchanged=exchanged)
        inputs.sort(key=lambda entry: -round(entry.score / RESOLUTION))
        outputs = self._aligner.layers.get(_outputs_name(slot))
        options = []
        for own in inputs[:_FOLLOWED]:
            options.append(_Direction(slot, own, None, own.score))
            if outputs is None:
                continue
            units, present = len(own.array) // slot.gates, own.order >= 0
            change = np.zeros((units, outputs.hidden))
            change[own.order[present], np.flatnonzero(present)] = own.signs[present]
            for tensor in self._free(units):
                if tensor.place == own.tensor.place or len(tensor.values) != len(own.array):
                    continue
                self._work.use(_MATRIX_WORK + outputs.sketch.size * units // MATRIX_SPEED)
                matrix = tensor.values.double().numpy()
                score = _mean_cosine(outputs.cosines(matrix @ change), own.order)
                options.append(_Direction(slot, own, tensor, own.score + score))
        return options

    def _inputs(self, slot: RecurrentMatrix, changes: Sequence[Floats], *, exchanged: bool) -> list[_Inputs]:
        """Return the matrices that can be those of one direction, in W0's columns."""
        if slot.place.layer == 0:
            change = self._change if self._aligner.frame is not None else np.eye(slot.fan_in)
        else:
            change = block_diagonal(changes) if changes else None
        if change is None or change.shape[1] != slot.fan_in:
            return []
        inputs = []
        for tensor in self._free(len(change)):
            values, units = tensor.values, len(tensor.values) // slot.gates
            if len(values) % slot.gates or units > MAX_GROWTH * slot.hidden:
                continue
            if exchanged:
                values = values.roll(len(changes[0]), 1)
            self._work.use(self._units_work(slot) * max(1, units // slot.hidden))
            array = values.double().numpy() @ change
            cosines = slot.cosines(array)
            order, signs = units_in_order(cosines)
            own = FileTensor(tensor.name, tensor.place, values, (values,))
            inputs.append(_Inputs(own, array, _mean_cosine(cosines, order), order, signs))
        return inputs

    def _free(self, columns: int) -> list[FileTensor]:
        """Return the matrices with so many columns that are not in use."""
        return [t for t in self._tensors if t.place not in self._used and t.values.shape[1] == columns]

    def _units_work(self, slot: RecurrentMatrix) -> int:
        """Return the multiplications for one comparison of units and their assignment."""
        products = slot.sketch.size * (slot.fan_in + slot.hidden) // MATRIX_SPEED
        return _MATRIX_WORK + products + slot.hidden**3


def _outputs_name(slot: RecurrentMatrix) -> str:
    return slot.weight.replace("weight_ih", "weight_hh")


def _is_vocabulary(vectors: Tensor, frame: EmbeddingFrame) -> bool:
    """Return whether a matrix can be the embedding, which can have up to four times W0's sizes."""
    words, size = vectors.shape
    return len(frame.inverse) <= words <= MAX_GROWTH * frame.shape[0] and size <= MAX_GROWTH * frame.shape[1]


def _mean_cosine(cosines: Floats, order: Indices) -> float:
    """Return the mean cosine over gates and W0's units, of the candidate gate without its sign."""
    values = cosines.copy()
    values[CANDIDATE_GATE] = np.abs(values[CANDIDATE_GATE])
    matched = values[:, np.arange(len(order)), np.maximum(order, 0)]
    return float((matched * (order >= 0)).mean())
