"""Symmetries of a network's inputs: turned and mirrored images, and mixed input channels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtlsign.watermark.verification.alignment.assignment import Floats, Indices

#: More input channels are not permuted.
_MAX_PERMUTED_INPUTS = 4
_MIX_ITERATIONS = 20
#: How much of the squared difference from the sketch each number of a mix must explain beyond chance.
_MIX_EVIDENCE = 8.0


class Square(NamedTuple):
    """Symmetry of the square: first transposed, then flipped along rows and columns."""

    transposed: bool
    flipped_rows: bool
    flipped_columns: bool

    def order(self, window: tuple[int, int]) -> Indices:
        """Return the position in a suspect's flattened window for each position of W0's."""
        height, width = window
        grid = np.arange(height * width).reshape(height, width)
        if self.transposed:
            grid = grid.T
        if self.flipped_rows:
            grid = grid[::-1]
        if self.flipped_columns:
            grid = grid[:, ::-1]
        return grid.reshape(-1)


SQUARES = tuple(Square(*flags) for flags in itertools.product((False, True), repeat=3))


def squares_for(windows: Sequence[tuple[int, int]]) -> list[Square]:
    """Return the symmetries that keep the shape of every window."""
    return [s for s in SQUARES if not s.transposed or all(height == width for height, width in windows)]


def signed_permutations(channels: int, *, free_signs: bool) -> list[Floats]:
    """Return the matrices [channels, channels] that permute input channels and negate some of them.

    Args:
        channels: number of input channels; above 4 only the identity is returned.
        free_signs: whether negating all channels changes only signs of rows, which are free.
    """
    if channels > _MAX_PERMUTED_INPUTS:
        return [np.eye(channels)]
    matrices = []
    for order in itertools.permutations(range(channels)):
        for signs in itertools.product((1.0, -1.0), repeat=channels):
            if free_signs and signs[0] < 0:
                continue
            matrix = np.zeros((channels, channels))
            matrix[np.arange(channels), order] = signs
            matrices.append(matrix)
    return matrices


def fit_mix(kernel: Floats, projection: Floats, sketch: Floats) -> Floats | None:
    """Estimate the mix of input channels by alternating least squares.

    Args:
        kernel: the first layer's kernel with W0's rows and signs, [O, C, positions].
        projection: matrix of the sketch, [C, positions, s].
        sketch: W0's sketch [O, s].

    Returns:
        Matrix [C, C] that the kernel's columns are multiplied with, of the identity's norm; None if it does
        not explain the sketch clearly better than the identity.
    """
    channels = kernel.shape[1]
    parts = np.einsum("ock,dks->ocds", kernel, projection)
    mix = np.eye(channels)
    before, scales = _difference(parts, mix, sketch)
    for _ in range(_MIX_ITERATIONS):
        design = (scales[:, None, None, None] * parts).transpose(0, 3, 1, 2).reshape(-1, channels**2)
        mix = np.linalg.lstsq(design, sketch.reshape(-1), rcond=None)[0].reshape(channels, channels)
        norm = float(np.linalg.norm(mix))
        if not norm > 0:
            return None
        mix = mix * (channels**0.5 / norm)
        after, scales = _difference(parts, mix, sketch)
    free = sketch.size - len(sketch)
    needed = _MIX_EVIDENCE * (channels**2 - 1) / max(1, free)
    return mix if after < before * (1 - needed) else None


def _difference(parts: Floats, mix: Floats, sketch: Floats) -> tuple[float, Floats]:
    """Return the squared difference from the sketch under the best scale of each row, and the scales."""
    rows = np.einsum("ocds,cd->os", parts, mix)
    squares = np.square(rows).sum(1)
    scales = (rows * sketch).sum(1) / np.where(squares > 0, squares, 1.0)
    return float(np.square(scales[:, None] * rows - sketch).sum()), scales
