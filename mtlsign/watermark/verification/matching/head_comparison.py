"""Comparison of products of matrices with W0's heads, and the choice of the most similar ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from mtlsign.models.unnamed_tensors import FileTensor
from mtlsign.watermark.verification.alignment.assignment import (
    RESOLUTION,
    Floats,
    Indices,
    best_assignment,
)
from mtlsign.watermark.verification.alignment.layers import unit_rows
from mtlsign.watermark.verification.alignment.transformer import HeadProducts

Scores = npt.NDArray[np.float32]


def spread(count: int, most: int) -> Indices:
    """Return evenly spaced numbers below a count, at most so many."""
    number = min(count, most)
    return np.arange(number, dtype=np.int64) * count // max(number, 1)


def largest_head(rows: Floats, size: int) -> int:
    """Return the head with the largest numbers, whose rows follow each other."""
    return int(np.square(rows).reshape(-1, size * rows.shape[1]).sum(1).argmax())


def unit_vectors(rows: Floats) -> Floats:
    """Return rows of unit length along the last axis."""
    flat = unit_rows(rows.reshape(-1, rows.shape[-1]))
    return np.asarray(flat.reshape(rows.shape))


def head_targets(heads: HeadProducts, rows: Indices) -> Floats:
    """Return chosen rows of the sketches of W0's heads, [heads, rows * s]."""
    own = unit_rows(heads.sketch).reshape(heads.heads, heads.rows, -1)[:, rows]
    return np.asarray(own.reshape(heads.heads, -1))


def similarities(products: Floats, targets: Sequence[Floats]) -> Floats:
    """Return the mean cosine with the most similar head of each layer, [products, layers]."""
    own = unit_vectors(products)
    flat = own.reshape(len(own), -1)
    return np.stack([(flat @ target.T).max(1) / own.shape[1] for target in targets], 1)


def assigned(scores: Floats) -> list[int]:
    """Return the candidate of each slot, −1 without one."""
    if not scores.shape[1]:
        return [-1] * len(scores)
    return [int(column) for column in best_assignment(scores)]


def exclude_equal_places(
    scores: Scores,
    first: Sequence[FileTensor],
    second: Sequence[FileTensor],
) -> None:
    """Leave out pairs of one tensor with itself."""
    places = np.array([t.place for t in second], dtype=np.int64)
    for row, tensor in enumerate(first):
        scores[row, places == tensor.place] = -np.inf


def best_triples(
    scores: Scores,
    first: Sequence[FileTensor],
    second: Sequence[FileTensor],
) -> Iterator[tuple[int, int, int]]:
    """Yield first matrix, second matrix and slot of the most similar triples, each used once."""
    values = np.rint(scores / RESOLUTION)
    ones = np.array([t.place for t in first], dtype=np.int64)
    others = np.array([t.place for t in second], dtype=np.int64)
    for _ in range(scores.shape[2]):
        if not values.size:
            return
        best = np.unravel_index(int(values.argmax()), values.shape)
        if values[best] == -np.inf:
            return
        row, column, slot = (int(number) for number in best)
        yield row, column, slot
        used = (ones[row], others[column])
        values[np.isin(ones, used)] = -np.inf
        values[:, np.isin(others, used)] = -np.inf
        values[:, :, slot] = -np.inf
