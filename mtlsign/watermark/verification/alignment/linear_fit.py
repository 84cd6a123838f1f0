"""Estimate of a mix of linear channels from the sketches of the kernels that write and read them.

Only additions stand between these kernels, so that any invertible matrix M can mix the channels where they
are written, with its inverse where they are read. With W0's kernels K and R, and factors D and F of the rows
that batch norms make free, a suspect has D·M·F·K and, up to factors of its rows, R·M⁻¹. The sketches of K and
R give linear equations for M (docs/decisions/0026-mixes-undone-from-the-sketches.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtlsign.watermark.verification.alignment.assignment import Floats
from mtlsign.watermark.verification.alignment.layers import unit_rows

#: Iterations of the power method: for the first weights of the readers' rows, and for later ones.
_FIRST_POWERS, _POWERS = 30, 5
_READER_ROUNDS, _FACTOR_ROUNDS, _SCALING_ROUNDS, _REFINEMENTS = 8, 4, 6, 4
#: Weight of the metric in the equations of a mix, and of the earlier factors in those of new ones.
_RIDGE = 1e-2
#: Share of the largest number below which numbers count as this share of it.
_SMALL = 1e-9


@dataclass(frozen=True)
class WrittenKernel:
    """A suspect's kernel that writes the channels, and W0's description of it.

    Attributes:
        kernel: float64 [d, I, positions], columns and positions in W0's order.
        columns: W0's column norms [I].
        projection: matrix of the sketch [I, positions, s].
        directions: sketches of W0's rows, of unit length [d, s].
    """

    kernel: Floats
    columns: Floats
    projection: Floats
    directions: Floats

    def sketch(self, scales: Floats) -> Floats:
        """Return the sketches of the rows [d, s] with multiplied columns."""
        rows = (self.kernel * scales[None, :, None]).reshape(len(self.kernel), -1)
        projected: Floats = rows @ self.projection.reshape(-1, self.projection.shape[2])
        return projected


@dataclass(frozen=True)
class UndoneMix:
    """Matrices that undo a mix.

    Attributes:
        writers: matrix [d, d] that each kernel which writes the channels is multiplied with, from the left.
        reader: matrix [d, d] that the columns of kernels which read the channels are multiplied with.
    """

    writers: Sequence[Floats]
    reader: Floats


def estimate_operations(channels: int, rows: int, columns: int, size: int) -> float:
    """Return a bound of the operations of one `undone_mix`.

    Args:
        channels: d.
        rows: of the kernels that read the channels.
        columns: flattened input columns of the kernels that write them.
        size: largest number of projections of a row.
    """
    powers = _FIRST_POWERS + (_READER_ROUNDS - 1) * _POWERS
    reading = rows * channels * (2.0 * _READER_ROUNDS * channels + 4.0 * (powers + _READER_ROUNDS) * size)
    metrics = 4.0 * _SCALING_ROUNDS + 2.0 * (_REFINEMENTS + 1)
    sketches = 2.0 * (2 + 2 * _REFINEMENTS + 1)
    writing = columns * channels * (metrics * channels + sketches * size)
    solving = 20.0 * (2 * _FACTOR_ROUNDS + _REFINEMENTS + 2) * channels**2 * (channels + size)
    return reading + writing + solving


def undone_mix(
    rows: Floats, directions: Floats, projection: Floats, writers: Sequence[WrittenKernel]
) -> UndoneMix:
    """Estimate the matrices that undo a mix of d channels.

    Args:
        rows: rows of the kernels that read the channels, in W0's order [E, d].
        directions: sketches of W0's rows, of unit length [E, s].
        projection: matrix of their sketch [d, s].
        writers: the kernels that write the channels.

    Raises:
        numpy.linalg.LinAlgError: the kernels determine no mix.
    """
    mixed = projected_mix(rows, directions)
    scales = [np.ones(writer.kernel.shape[1]) for writer in writers]
    factors = _row_factors(mixed, projection, writers, scales)
    kernels = [w.kernel / f[:, None, None] for w, f in zip(writers, factors, strict=True)]
    scales = _column_scales(kernels, writers)
    factors = _row_factors(mixed, projection, writers, scales)
    for _ in range(_REFINEMENTS):
        inverse, metric = _inverse_mix(mixed, projection, writers, scales, factors)
        factors = [
            _refined_factor(inverse, writer, scale, factor)
            for writer, scale, factor in zip(writers, scales, factors, strict=True)
        ]
    inverse, metric = _inverse_mix(mixed, projection, writers, scales, factors)
    inverse = _nearer_to_orthogonal(inverse, metric)
    inverse = inverse / _nonzero(((inverse @ mixed) * projection).sum(1))[:, None]
    matrix = np.linalg.inv(inverse)
    # The readers' own sketches determine the mix best in the directions that they have.
    known = matrix @ projection
    error = (known * mixed).sum() / _square(mixed) * mixed - known
    reader = matrix + error @ np.linalg.pinv(projection)
    reader = reader * (len(reader) ** 0.5 / max(float(np.linalg.norm(reader)), 1e-300))
    return UndoneMix([inverse / factor for factor in factors], reader)


def _inverse_mix(
    mixed: Floats,
    projection: Floats,
    writers: Sequence[WrittenKernel],
    scales: Sequence[Floats],
    factors: Sequence[Floats],
) -> tuple[Floats, Floats]:
    """Return the inverse of the mix, up to a factor of each row, and the metric of its columns."""
    parts = list(zip(writers, scales, factors, strict=True))
    kernels = [(w.kernel * c[None, :, None] / f[:, None, None]).reshape(len(f), -1) for w, c, f in parts]
    metric = np.sum([kernel @ kernel.T / _square(kernel) for kernel in kernels], 0)
    sketches = [writer.sketch(scale) / factor[:, None] for writer, scale, factor in parts]
    targets = [projection, *(writer.directions for writer in writers)]
    return _parallel_rows([mixed, *sketches], targets, metric), metric


def _refined_factor(inverse: Floats, writer: WrittenKernel, scale: Floats, factor: Floats) -> Floats:
    """Return the factor of each row of a writer's kernel with which the inverse fits its sketch best."""
    sketch = writer.sketch(scale) / factor[:, None]
    fitted = inverse @ sketch
    rows = inverse / _nonzero(np.linalg.norm(fitted, axis=1))[:, None]
    signs = np.where((fitted * writer.directions).sum(1) < 0, -1.0, 1.0)
    gram = (rows.T @ rows) * (sketch @ sketch.T)
    ridge = _RIDGE * np.trace(gram) / len(gram)
    right = ((rows.T @ (signs[:, None] * writer.directions)) * sketch).sum(1)
    refined: Floats = np.linalg.solve(gram + ridge * np.eye(len(gram)), right + ridge)
    return _nonzero(factor / _nonzero(refined))


def projected_mix(rows: Floats, directions: Floats) -> Floats:
    """Return the matrix [d, s] that makes every row parallel to its sketch: M·S/√s up to one factor.

    Its start is the largest eigenvector of (Q·Qᵀ)∘(T·Tᵀ) with an orthonormal basis Q of the rows and the
    sketches T: the factors of the rows. Rows that fit badly then lose weight.

    Args:
        rows: [E, d].
        directions: of unit length [E, s].

    Raises:
        numpy.linalg.LinAlgError: the rows span less than d dimensions.
    """
    weights = 1 / _nonzero(np.linalg.norm(rows, axis=1))
    factors = np.ones(len(rows))
    matrix = np.zeros((rows.shape[1], directions.shape[1]))
    for number in range(_READER_ROUNDS):
        weighted = rows * weights[:, None]
        gram = weighted.T @ weighted
        solved = np.linalg.solve(gram + _SMALL * np.trace(gram) * np.eye(len(gram)), weighted.T).T
        for _ in range(_POWERS if number else _FIRST_POWERS):
            factors = ((weighted @ (solved.T @ (factors[:, None] * directions))) * directions).sum(1)
            factors = factors / max(float(np.linalg.norm(factors)), 1e-300)
        matrix = solved.T @ (factors[:, None] * directions)
        fitted = rows @ matrix
        norms = np.linalg.norm(fitted, axis=1)
        residuals = 1 - ((fitted * directions).sum(1) / _nonzero(norms)) ** 2
        typical = max(2 * float(np.median(residuals)), _SMALL)
        floor = max(0.05 * float(np.median(norms)), 1e-300)
        weights = 1 / np.sqrt(1 + (residuals / typical) ** 2) / np.maximum(norms, floor)
    return matrix


def _row_factors(
    mixed: Floats, projection: Floats, writers: Sequence[WrittenKernel], scales: Sequence[Floats]
) -> list[Floats]:
    """Return the factor of each row of the writers' kernels, with its sign: [d] for each writer.

    Row j of the mix is parallel to row j of `mixed`, and times F·T to that of every writer's sketch. The
    factors F of W0's rows are estimated in turn, from 1.
    """
    size = len(projection)
    sketches = [writer.sketch(scale) for writer, scale in zip(writers, scales, strict=True)]
    own = [np.ones(size) for _ in writers]
    factors = own
    for _ in range(_FACTOR_ROUNDS):
        blocks = [f[:, None] * w.directions for f, w in zip(own, writers, strict=True)]
        mix = _parallel_rows(
            [projection, *blocks], [unit_rows(mixed), *(unit_rows(s) for s in sketches)], np.eye(size)
        )
        mix = mix * (np.square(mixed).sum(1) / _nonzero(((mix @ projection) * mixed).sum(1)))[:, None]
        factors = []
        for number, (writer, sketch) in enumerate(zip(writers, sketches, strict=True)):
            fitted = mix @ blocks[number]
            factor = (fitted * sketch).sum(1) / _nonzero(np.square(fitted).sum(1))
            factors.append(factor)
            rows = mix / _nonzero(np.linalg.norm(fitted, axis=1))[:, None]
            signed = unit_rows(sketch) * np.sign(factor)[:, None]
            gram = (rows.T @ rows) * (writer.directions @ writer.directions.T)
            ridge = _RIDGE * np.trace(gram) / size
            right = ((rows.T @ signed) * writer.directions).sum(1)
            solution = np.linalg.solve(gram + ridge * np.eye(size), right + ridge * own[number])
            solution = np.maximum(solution, 0.05 * np.median(np.abs(solution)))
            own[number] = solution / max(float(np.sqrt(np.square(solution).mean())), 1e-300)
    return [_nonzero(factor) for factor in factors]


def _parallel_rows(blocks: Sequence[Floats], targets: Sequence[Floats], metric: Floats) -> Floats:
    """Return a matrix X whose rows, times each block, are as parallel to the targets' rows as possible.

    For row i it maximises Σ (x·B_k·t_ki)² / x·(Σ B_k·B_kᵀ + a share of the metric)·xᵀ with blocks of norm 1.

    Args:
        blocks: [d, s_k] each.
        targets: rows of unit length [n, s_k] each.
        metric: symmetric and positive [d, d].
    """
    scaled = [block / max(float(np.linalg.norm(block)), 1e-300) for block in blocks]
    gram = np.sum([block @ block.T for block in scaled], 0)
    gram = gram + _RIDGE * len(blocks) / max(float(np.trace(metric)), 1e-300) * metric
    pairs = np.stack([block @ target.T for block, target in zip(scaled, targets, strict=True)], 2)
    solved = np.linalg.solve(gram, pairs.reshape(len(gram), -1)).reshape(pairs.shape)
    vectors = np.linalg.eigh(np.einsum("ank,anl->nkl", pairs, solved))[1][:, :, -1]
    rows: Floats = np.einsum("ank,nk->na", solved, vectors)
    return rows


def _column_scales(kernels: Sequence[Floats], writers: Sequence[WrittenKernel]) -> list[Floats]:
    """Return multipliers of the input columns that give them W0's norms in the kernels' common metric.

    The metric Σ K·Kᵀ of the scaled kernels makes the norms independent of the mix.
    """
    kernels = [kernel / np.sqrt(_square(kernel)) for kernel in kernels]
    scales = [np.ones(kernel.shape[1]) for kernel in kernels]
    for _ in range(_SCALING_ROUNDS):
        metric = np.zeros((len(kernels[0]), len(kernels[0])))
        for kernel, scale in zip(kernels, scales, strict=True):
            scaled = (kernel * scale[None, :, None]).reshape(len(kernel), -1)
            metric += scaled @ scaled.T / _square(scaled)
        inverse = np.linalg.inv(metric + _SMALL * np.trace(metric) * np.eye(len(metric)))
        for number, (kernel, writer) in enumerate(zip(kernels, writers, strict=True)):
            squares = (np.tensordot(inverse, kernel, 1) * kernel).sum((0, 2))
            present = squares > _SMALL * float(squares.max())
            solution = np.where(present, writer.columns / np.sqrt(np.where(present, squares, 1.0)), 0.0)
            scales[number] = solution / max(float(np.linalg.norm(solution)), 1e-300)
    return scales


def _nearer_to_orthogonal(inverse: Floats, metric: Floats) -> Floats:
    """Return a matrix of unit rows whose singular values in a metric are the square roots of the given one's.

    Kernels of many columns have nearly orthogonal rows, and errors of the estimate make them less so.
    """
    root = np.linalg.cholesky(metric + _SMALL * np.trace(metric) * np.eye(len(metric)))
    left, values, right = np.linalg.svd(unit_rows(inverse @ root))
    values = np.sqrt(np.maximum(values, _SMALL))
    nearer: Floats = np.linalg.solve(root.T, ((left * values) @ right).T).T
    return nearer


def _square(values: Floats) -> float:
    """Return the sum of squares; 1 if it is 0."""
    total = float(np.square(values).sum())
    return total if total > 0 else 1.0


def _nonzero(values: Floats) -> Floats:
    """Return the numbers, but those near 0 as a small share of the largest one, with their sign."""
    limit = max(_SMALL * float(np.abs(values).max(initial=0.0)), 1e-300)
    signs = np.where(values < 0, -1.0, 1.0)
    limited: Floats = np.where(np.abs(values) < limit, signs * limit, values)
    return limited
