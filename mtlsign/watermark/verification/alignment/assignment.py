"""Assignment of channels: the pairs with the largest total similarity."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

#: Similarities are rounded to multiples of this before they are compared, so that machines agree.
RESOLUTION = 2.0**-20


def quantized(values: Floats) -> Floats:
    """Round numbers to multiples of `RESOLUTION`, in units of it."""
    rounded: Floats = np.rint(values / RESOLUTION)
    return rounded


def best_assignment(similarities: Floats) -> Indices:
    """Return the column of each row in the assignment with the largest total.

    Args:
        similarities: [n, m].

    Returns:
        int64 [n]; −1 for rows without a column if n > m.
    """
    values = quantized(similarities)
    best: Indices = values.argmax(1).astype(np.int64)
    if len(values) <= values.shape[1] and len(np.unique(best)) == len(best):
        return best  # each row has its best column
    rows, columns = linear_sum_assignment(-values)
    assigned = np.full(len(values), -1, dtype=np.int64)
    assigned[rows] = columns
    return assigned


def assign(similarity: Floats) -> tuple[Indices, float]:
    """Return the best assignment, see `best_assignment`, and its total similarity."""
    order = best_assignment(similarity)
    known = order >= 0
    return order, float(similarity[np.flatnonzero(known), order[known]].sum())
