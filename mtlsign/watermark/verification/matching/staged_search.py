"""Search for the matrices of a transformer, one stage after the other.

The sources of the first stage are searched first, and each other with the coordinates of the stage before: a
matrix between two stages reads the first one and starts the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mtlsign.models.stream_stages import StreamStage
from mtlsign.models.unnamed_tensors import FileTensor
from mtlsign.watermark.verification.alignment import TransformerAligner
from mtlsign.watermark.verification.alignment.assignment import quantized
from mtlsign.watermark.verification.alignment.stream_frame import StreamFrame
from mtlsign.watermark.verification.matching.candidates import Work
from mtlsign.watermark.verification.matching.stream_search import MAX_GAINS
from mtlsign.watermark.verification.matching.stream_sources import (
    MATRIX_SPEED,
    product_correlation,
    products_work,
)
from mtlsign.watermark.verification.matching.transformer_search import TransformerSearch
from mtlsign.watermark.verification.stream_sources import stage_vectors

#: Least cosine of the gain of the first norm with W0's.
_GAIN_COSINE = 0.5


def search_transformer(
    aligner: TransformerAligner,
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, FileTensor],
    tensors: Sequence[FileTensor],
    work: Work,
) -> dict[str, Tensor]:
    """Return the tensors by the network's names, as far as they are in the file.

    Args:
        aligner: alignment with W0, or its control with random sketches.
        shapes: of the network's tensors.
        sources: result of `find_sources`.
        tensors: of the file; matrices have W0's axes.
        work: limit of the multiplications.

    Raises:
        ModelError: the limit is exceeded.
    """
    stream, frame = aligner.products.stream, aligner.frame
    first = {name: source for name, source in sources.items() if name not in stream.mergings}
    chosen = {name: source.values for name, source in first.items()}
    used = {source.place for source in first.values()}
    coordinates, before = dict(chosen), None
    for stage in stream.parts:
        if before is not None:
            coordinates = _merging(frame, stage, before, work)
        elif stage.first_norm is not None:
            coordinates |= _first_gain(frame, stage, coordinates, tensors)
            chosen |= {name: vector for name, vector in coordinates.items() if name not in chosen}
        before = TransformerSearch(aligner, shapes, stage, coordinates, tensors, work, chosen, used)
        before.run()
    return chosen


def _first_gain(
    frame: StreamFrame, stage: StreamStage, sources: Mapping[str, Tensor], tensors: Sequence[FileTensor]
) -> dict[str, Tensor]:
    """Return the gain of the norm after the first sources, up to its sign the vector most similar to W0's."""
    name = f"{stage.first_norm}.weight"
    known, vectors = frame.first_gains.get(name), _vectors(tensors, stage.size)
    if known is None or not vectors:
        return {}
    turn = frame.turn(stage, sources)
    ordered = np.stack([v.double().numpy() for v in vectors])
    if turn is not None:
        ordered = ordered @ turn.numpy()
    norms = np.linalg.norm(ordered, axis=1) * float(known.norm())
    cosines = np.abs(ordered @ known.numpy()) / np.maximum(norms, 1e-300)
    best = int(quantized(cosines).argmax())
    return {name: vectors[best]} if cosines[best] > _GAIN_COSINE else {}


def _merging(
    frame: StreamFrame, stage: StreamStage, before: TransformerSearch, work: Work
) -> dict[str, Tensor]:
    """Choose the matrix before a stage and its gain; return it in the coordinates of the stage before."""
    (name,) = stage.sources
    known, shape = frame.rows.get(name), before.shapes[name]
    candidates = [t for t in before.tensors if t.place not in before.used and tuple(t.values.shape) == shape]
    if known is None:
        return {}
    gains = [torch.ones(shape[1]), *_vectors(before.tensors, shape[1])]
    best, place, coordinates = -np.inf, None, {}
    for tensor in candidates:
        for number, gain in enumerate(gains):
            work.use(
                products_work(len(known), stage.size)
                + tensor.values.numel() * before.stage.size // MATRIX_SPEED
            )
            matrix = _turned(frame, tensor.values.double() * gain.double(), before)
            vectors = stage_vectors(name, matrix, frame.stream, stage.size)
            if vectors is None or len(vectors) < len(known):
                continue
            similarity = product_correlation(frame, vectors[: len(known)], known)
            if similarity > best:
                best, place, coordinates = similarity, tensor.place, {name: matrix}
                before.chosen[name] = tensor.values
                if number:
                    before.chosen[frame.stream.gains[name]] = gain
                else:
                    before.chosen.pop(frame.stream.gains[name], None)
    before.used |= set() if place is None else {place}
    return coordinates


def _turned(frame: StreamFrame, matrix: Tensor, before: TransformerSearch) -> Tensor:
    """Return a matrix between stages with W0's coordinates of the stage before in its columns."""
    if frame.stream.subtracts_mean:
        matrix = matrix - matrix.mean(1, keepdim=True)
    turn = torch.from_numpy(before.turn)
    return (matrix.reshape(-1, len(turn)) @ turn).reshape(matrix.shape)


def _vectors(tensors: Sequence[FileTensor], size: int) -> list[Tensor]:
    """Return the vectors of a size that can be gains; none if there are too many."""
    vectors = [t.values for t in tensors if tuple(t.values.shape) == (size,)]
    return vectors if len(vectors) <= MAX_GAINS else []
