"""Factors of the channels inside a product, if the file does not hold the values of the batch norm there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mtlsign.watermark.verification.alignment.assignment import Floats, Indices
from mtlsign.watermark.verification.alignment.suspect import SuspectLayer

_ITERATIONS = 20
#: How much of the squared difference from the sketch each factor must explain beyond chance.
_EVIDENCE = 8.0
#: Share of the mean diagonal that is added to the normal equations.
_RIDGE = 1e-9


def with_fitted_factors(part: SuspectLayer, order: Indices, projection: Floats) -> SuspectLayer | None:
    """Return a product with one factor for each channel, estimated by alternating least squares.

    Args:
        part: a product with both kernels.
        order: the suspect's row for each of W0's; −1 where there is none.
        projection: matrix of the sketch for its flattened rows, [I'·positions, s].

    Returns:
        The product with factors of mean square 1; None if it does not explain W0's sketch clearly better.
    """
    assert part.kernels is not None
    known = (order >= 0)[:, None]
    outer, inner = part.kernels[0][np.maximum(order, 0)] * known, part.kernels[1] @ projection
    current = part.kernel.reshape(len(part.kernel), -1)[np.maximum(order, 0)] * known @ projection
    sketch = part.layer.sketch
    channels, products = outer.shape[1], inner @ inner.T
    factors = np.ones(channels)
    targets = outer * (sketch @ inner.T)
    before, after = _difference(current, sketch)[0], np.inf
    scales = _difference(outer @ inner, sketch)[1]
    for _ in range(_ITERATIONS):
        scaled = outer * scales[:, None]
        normal = (scaled.T @ scaled) * products
        normal += _RIDGE * max(float(np.trace(normal)) / channels, 1e-300) * np.eye(channels)
        factors = np.linalg.solve(normal, (targets * scales[:, None]).sum(0))
        size = float(np.sqrt(np.square(factors).mean()))
        if not 0 < size < np.inf:
            return None
        factors = factors / size
        after, scales = _difference((outer * factors) @ inner, sketch)
    free = sketch.size - len(sketch)
    if not after < before * (1 - _EVIDENCE * channels / max(1, free)):
        return None
    scaled = part.kernels[1] * factors[:, None]
    return replace(part, kernel=(part.kernels[0] @ scaled).reshape(part.kernel.shape))


def _difference(rows: Floats, sketch: Floats) -> tuple[float, Floats]:
    """Return the squared difference from the sketch under the best scale of each row, and the scales."""
    squares = np.square(rows).sum(1)
    scales = (rows * sketch).sum(1) / np.where(squares > 0, squares, 1.0)
    return float(np.square(scales[:, None] * rows - sketch).sum()), scales
