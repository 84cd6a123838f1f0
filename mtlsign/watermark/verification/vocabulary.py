"""Order of a vocabulary: words found again by their vectors, in any order and any coordinates.

Word vectors can be multiplied with an invertible matrix and put into another order, if the tokenizer and the
layers after them follow. Moments over the whole vocabulary do not depend on the order. They give coordinates
that do not depend on the matrix: whitened vectors, along the eigenvectors of the covariance weighted by the
squared length (FOBI: Cardoso 1989).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

#: Directions with less than this share of the largest variance are left out.
_SMALLEST = 1e-9
#: Rounds in which the words are matched again after a least-squares fit to the surest half.
_ROUNDS = 6
#: Largest vocabulary, and largest vectors, in which words are looked for.
MAX_WORDS, MAX_DIMENSIONS = 2**18, 1024
#: Words that are compared at once.
_BLOCK = 2**14


@dataclass(frozen=True)
class VocabularyAxes:
    """Coordinates that follow from a vocabulary's vectors alone.

    Attributes:
        mean: float64 [d].
        axes: float64 [d, k], as columns.
    """

    mean: Tensor
    axes: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Self:
        """Compute the coordinates of all vectors of a vocabulary, [V, d]."""
        vectors = vectors.double()
        mean = vectors.mean(0)
        centred = vectors - mean
        values, directions = torch.linalg.eigh(centred.T @ centred / len(vectors))
        varied = values > _SMALLEST * values[-1].clamp(min=1e-300)
        whitening = directions[:, varied] / values[varied].sqrt()
        white = centred @ whitening
        lengths = white.square().sum(1, keepdim=True)
        axes = whitening @ torch.linalg.eigh((white * lengths).T @ white / len(vectors))[1]
        signs = torch.where((centred @ axes).pow(3).sum(0) < 0, -1.0, 1.0)
        return cls(mean, axes * signs)

    def coordinates(self, vectors: Tensor) -> Tensor:
        """Return the coordinates of vectors, float64 [n, k]."""
        return (vectors.double() - self.mean) @ self.axes


def find_words(known: Tensor, vectors: Tensor) -> Tensor | None:
    """Find known words in a vocabulary of unknown order and coordinates.

    Args:
        known: coordinates of the known words, float64 [r, k].
        vectors: all vectors of the suspect, [V, d].

    Returns:
        int64 [r], a row of `vectors` for each known word; None if the vectors have other dimensions, or are
        more or longer than the search allows.
    """
    if len(vectors) > MAX_WORDS or vectors.shape[1] > MAX_DIMENSIONS:
        return None
    own = VocabularyAxes.of(vectors)
    if own.axes.shape[1] != known.shape[1] or not bool(torch.isfinite(own.axes).all()):
        return None
    coordinates = own.coordinates(vectors)
    rows = torch.full((len(known),), -1)
    extended = torch.cat([vectors.double(), torch.ones(len(vectors), 1, dtype=torch.float64)], 1)
    for _ in range(_ROUNDS):
        distances, nearest = _nearest(known, coordinates)
        if torch.equal(nearest, rows):
            break
        rows = nearest
        surest = distances.argsort()[: max(len(known) // 2, 1)]
        fit = torch.linalg.pinv(extended[rows[surest]]) @ known[surest]
        coordinates = extended @ fit
    return rows


def _nearest(known: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Return distance and row of the nearest coordinates for each known word."""
    blocks = [torch.cdist(known, block).min(1) for block in coordinates.split(_BLOCK)]
    values, block = torch.stack([b.values for b in blocks]).min(0)
    rows = torch.stack([b.indices for b in blocks]).gather(0, block[None])[0]
    return values, rows + block * _BLOCK
