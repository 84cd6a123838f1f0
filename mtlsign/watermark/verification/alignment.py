"""Bring a network's kernels into W0's frame, so that free rescalings cannot move the mark
(design decision 5).

A network with batch norm computes the same function after any of its convolution rows is scaled (the norm
undoes it), after an inner channel is scaled up in one layer and down in the next, and after the batch norm is
folded into the convolution. The frame removes all of that: rows to unit norm, input columns to W0's column
norms, alternately. Permutations and input symmetries will be undone here too, from the reference's sketch
(format v1).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Alternating rounds of a verification; part of the format.
SINKHORN_ITERATIONS = 50


def squared_block_norms(kernel: Tensor, groups: int = 1) -> Tensor:
    """Squared norms of a kernel's (row, input column) blocks.

    Args:
        kernel: float [O, I/groups, ...spatial], any float dtype.
        groups: the convolution's groups.

    Returns:
        float64 [groups, O/groups, I/groups].
    """
    k = kernel.double()
    return k.square().reshape(k.shape[0], k.shape[1], -1).sum(-1).reshape(groups, -1, k.shape[1])


def column_norms(kernel: Tensor, groups: int = 1) -> Tensor:
    """Column norms of a kernel with unit rows, which are W0's frame: float64 [groups, I/groups]."""
    p = squared_block_norms(kernel, groups)
    return (p / _safe_divisor(p.sum(2, keepdim=True))).sum(1).sqrt()


def canonicalize_kernels(
    kernel: Tensor, columns: Tensor, groups: int = 1, *, differentiable_rounds: int = 0
) -> Tensor:
    """Scale rows and input columns of `kernel` by positive numbers until rows are units and columns W0's.

    This is Sinkhorn's iteration on the squared block norms: `ROUNDS` times rows, then columns; last the
    rows; in float64. A row or column of zeros stays zero. W0 itself is a fixed point.

    Args:
        kernel: float [O, I/groups, ...spatial].
        columns: float64 [groups, I/groups], W0's `column_norms`.
        groups: the convolution's groups.
        differentiable_rounds: 0 for verification; in training the fixed point is found without a graph, and
            this many rounds from there are differentiated (the map contracts fast; tests compare with all of
            them).

    Returns:
        float32 tensor of the kernel's shape.
    """
    p = squared_block_norms(kernel, groups)
    cols = torch.from_numpy(
        _sinkhorn_multipliers(p.detach().cpu().numpy(), columns.square().cpu().numpy())
    ).to(p.device)
    rows = 1 / _safe_divisor((p @ cols.unsqueeze(2)).squeeze(2))
    for _ in range(differentiable_rounds):
        cols = columns.square() / _safe_divisor((rows.unsqueeze(1) @ p).squeeze(1))
        rows = 1 / _safe_divisor((p @ cols.unsqueeze(2)).squeeze(2))
    scale = (rows.unsqueeze(2) * cols.unsqueeze(1)).sqrt().reshape(kernel.shape[0], -1)
    scale = scale.reshape(*scale.shape, *([1] * (kernel.dim() - 2)))
    return (kernel.double() * scale).float()


def _sinkhorn_multipliers(
    p: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Squared column multipliers [g, I] after `ROUNDS` rounds on the squared norms p [g, O, I]."""
    cols = np.ones_like(target)
    for _ in range(SINKHORN_ITERATIONS):
        mass_of_rows = (p @ cols[:, :, None])[:, :, 0]
        rows = 1 / np.where(mass_of_rows > 0, mass_of_rows, 1.0)
        mass_of_cols = (rows[:, None, :] @ p)[:, 0, :]
        cols = target / np.where(mass_of_cols > 0, mass_of_cols, 1.0)
    return cols


def _safe_divisor(sums: Tensor) -> Tensor:
    """A row or column without mass keeps its zeros: divide it by 1."""
    return torch.where(sums > 0, sums, torch.ones_like(sums))
