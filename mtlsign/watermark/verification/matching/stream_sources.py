"""Sources of a transformer's stream among the tensors of a file, which give the stream's coordinates.

Products of the vectors of one source are the same in all coordinates of the stream. They are compared with
those of W0's vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtlsign.models.unnamed_tensors import FileTensor, axis_orders, in_axis_order, is_stored_as
from mtlsign.models.untrusted import MAX_GROWTH
from mtlsign.watermark.verification.alignment.assignment import RESOLUTION
from mtlsign.watermark.verification.alignment.stream_frame import StreamFrame
from mtlsign.watermark.verification.matching.candidates import Work
from mtlsign.watermark.verification.stream_sources import stage_vectors

#: Vectors whose products are compared, and fewest vectors of a source.
_ROWS, _FEWEST = 256, 3
#: Correlation of the products from which a tensor is a source; of a vocabulary in its own order it is clear.
_ALIKE, _CLEAR = 0.25, 0.8
#: Tensors in which the words of another order are looked for.
_VOCABULARIES = 4
#: Those with at least one of so many of W0's words come first.
_WORDS_LEFT = 2
#: Multiplications of a product of matrices that take the time of one other.
MATRIX_SPEED = 8


def find_sources(frame: StreamFrame, tensors: Sequence[FileTensor], work: Work) -> dict[str, FileTensor]:
    """Return name of a source -> the tensor with the most similar products of its vectors.

    Args:
        frame: W0's coordinates of the stream.
        tensors: of the file.
        work: limit of the multiplications.

    Returns:
        Tensors with `values` in the axes of the source. Sources of one or two vectors are left out.

    Raises:
        ModelError: the limit is exceeded.
    """
    ranking = []
    for number, name in enumerate(frame.rows):
        if len(frame.rows[name]) >= _FEWEST:
            for similarity, tensor in _similar(frame, name, tensors, work):
                ranking.append((-round(similarity / RESOLUTION), number, tensor.place, name, tensor))
    sources: dict[str, FileTensor] = {}
    used: set[int] = set()
    for *_, place, name, tensor in sorted(ranking, key=lambda entry: entry[:3]):
        if name not in sources and place not in used:
            sources[name] = tensor
            used.add(place)
    return sources


def _similar(
    frame: StreamFrame, name: str, tensors: Sequence[FileTensor], work: Work
) -> Iterator[tuple[float, FileTensor]]:
    """Yield the tensors that can be a source, and the correlation of their products with W0's."""
    known, size = frame.rows[name], frame.rows[name].shape[1]
    candidates = []
    for tensor in _fitting(frame.shapes[name], tensors):
        vectors = stage_vectors(name, tensor.values, frame.stream, size)
        if vectors is not None and len(vectors) >= len(known):
            work.use(products_work(len(known), size))
            similarity = product_correlation(frame, vectors[: len(known)], known)
            candidates.append((similarity, tensor, vectors))
    best = max((similarity for similarity, _, _ in candidates), default=0.0)
    if name == frame.words_name and frame.words is not None and best < _CLEAR:
        candidates = likely_vocabularies(candidates, frame.shapes[name][0])
        for number, (similarity, tensor, vectors) in enumerate(candidates):
            work.use(word_search_work(len(known), vectors) // MATRIX_SPEED)
            ordered = product_correlation(frame, frame.words.find(vectors), known)
            candidates[number] = (max(similarity, ordered), tensor, vectors)
    yield from ((similarity, tensor) for similarity, tensor, _ in candidates if similarity > _ALIKE)


def likely_vocabularies(
    candidates: Sequence[tuple[float, FileTensor, Tensor]], count: int
) -> list[tuple[float, FileTensor, Tensor]]:
    """Return the few tables in which words of another order are looked for.

    Their number of words is most likely W0's. Smaller tables than half of it are tried if there are no
    others, because each try costs much work.

    Args:
        candidates: similarity, tensor, and its vectors [V, d].
        count: number of W0's words.
    """
    large = [entry for entry in candidates if _WORDS_LEFT * len(entry[2]) >= count] or candidates
    return sorted(large, key=lambda entry: (abs(len(entry[2]) - count), entry[1].place))[:_VOCABULARIES]


def _fitting(shape: tuple[int, ...], tensors: Sequence[FileTensor]) -> Iterator[FileTensor]:
    """Yield tensors with the axes of a source; a matrix can have more vectors or fewer."""
    for tensor in tensors:
        values = tensor.values
        if len(shape) == 2 and values.dim() == 2:
            for matrix in (values, values.T):
                if matrix.shape[1] == shape[1] and len(matrix) <= MAX_GROWTH * shape[0]:
                    yield FileTensor(tensor.name, tensor.place, matrix, (matrix,))
                    break
        elif len(shape) != 2:
            for order in axis_orders(len(shape)):
                if is_stored_as(tuple(values.shape), shape, order):
                    kernel = in_axis_order(values, shape, order)
                    yield FileTensor(tensor.name, tensor.place, kernel, (kernel,))
                    break


def products_work(vectors: int, size: int) -> int:
    """Return the multiplications for one call of `product_correlation`."""
    return 2**13 + min(vectors, _ROWS) ** 2 * size // MATRIX_SPEED


def product_correlation(frame: StreamFrame, vectors: Tensor, known: Tensor) -> float:
    """Return the correlation of the products of different vectors [r, d] with those of W0's."""
    products = []
    for rows in (vectors, known):
        relative = frame.relative(rows.double())[:_ROWS]
        relative = relative / relative.abs().amax().clamp(min=1e-300)
        products.append(relative @ relative.T)
    different = ~torch.eye(len(products[0]), dtype=torch.bool)
    own, expected = (product[different] - product[different].mean() for product in products)
    return float(own @ expected / (own.norm() * expected.norm()).clamp(min=1e-300))


def word_search_work(known: int, vectors: Tensor) -> int:
    """Return the multiplications that find so many known words in a vocabulary [V, d]."""
    count, size = vectors.shape
    return 20 * known * size**2 + 6 * known * count * size + 4 * count * size**2
