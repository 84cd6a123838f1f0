"""Canonical form of kernels: undo the rescalings that leave a network's function unchanged.

A network with batch norm computes the same function after three changes: any convolution row is scaled,
because the norm undoes it; an inner channel is scaled up in one layer and down in the next; the batch norm is
folded into the convolution. The canonical form removes all three: rows have unit norm and input columns have
W0's column norms (docs/decisions/0003). Permutations and input symmetries are not undone yet; the reference's
sketch is stored for that (format v1).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Alternating iterations of a verification; part of the format.
SINKHORN_ITERATIONS = 50


def apply_bn_sign(kernel: Tensor, gamma: Tensor | None) -> Tensor:
    """Multiply sign(γ) onto the rows, +1 where γ is absent or 0. The verifier reads nothing else of γ."""
    if gamma is None:
        return kernel
    sign = torch.where(gamma < 0, -1.0, 1.0).to(kernel.dtype)
    return kernel * sign.reshape(-1, *([1] * (kernel.dim() - 1)))


def squared_block_norms(kernel: Tensor, groups: int = 1) -> Tensor:
    """Compute the squared norms of a kernel's (row, input column) blocks.

    Args:
        kernel: float [O, I/groups, ...spatial], any float dtype.
        groups: the convolution's groups.

    Returns:
        float64 [groups, O/groups, I/groups].
    """
    k = kernel.double()
    return k.square().reshape(k.shape[0], k.shape[1], -1).sum(-1).reshape(groups, -1, k.shape[1])


def column_norms(kernel: Tensor, groups: int = 1) -> Tensor:
    """Compute the column norms of a kernel whose rows are scaled to unit norm: float64 [groups, I/groups]."""
    p = squared_block_norms(kernel, groups)
    return (p / _safe_divisor(p.sum(2, keepdim=True))).sum(1).sqrt()


def canonicalize_kernels(
    kernel: Tensor, columns: Tensor, groups: int = 1, *, differentiable_rounds: int = 0
) -> Tensor:
    """Scale rows and input columns by positive numbers until rows have unit norm and columns have W0's norms.

    This is Sinkhorn's iteration on the squared block norms in float64: `SINKHORN_ITERATIONS` times rows, then
    columns; finally the rows. A row or column of zeros remains zero. W0 itself is a fixed point.

    Args:
        kernel: float [O, I/groups, ...spatial].
        columns: float64 [groups, I/groups], W0's `column_norms`.
        groups: the convolution's groups.
        differentiable_rounds: 0 for verification. In training the fixed point is computed without a graph,
            and this many rounds from it are differentiated. Two suffice, because the map contracts fast.

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


def column_multipliers(squared_norms: Tensor, columns: Tensor, *, differentiable_rounds: int = 0) -> Tensor:
    """Compute the squared multipliers of input columns that `canonicalize_kernels` applies.

    Args:
        squared_norms: result of `squared_block_norms`, float64 [groups, O/groups, I/groups].
        columns: float64 [groups, I/groups], W0's `column_norms`.
        differentiable_rounds: 0 for verification. In training this many rounds from multipliers of 1 are
            differentiated: W0 is a fixed point, and W stays near it.

    Returns:
        float64 [groups, I/groups].
    """
    target = columns.square()
    if not differentiable_rounds:
        fixed_point = _sinkhorn_multipliers(squared_norms.detach().cpu().numpy(), target.cpu().numpy())
        return torch.from_numpy(fixed_point).to(squared_norms.device)
    multipliers = torch.ones_like(target)
    for _ in range(differentiable_rounds):
        rows = 1 / _safe_divisor((squared_norms @ multipliers.unsqueeze(2)).squeeze(2))
        multipliers = target / _safe_divisor((rows.unsqueeze(1) @ squared_norms).squeeze(1))
    return multipliers


def _sinkhorn_multipliers(
    p: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Compute squared column multipliers [g, I] from the squared block norms p [g, O, I]."""
    cols = np.ones_like(target)
    for _ in range(SINKHORN_ITERATIONS):
        row_sums = (p @ cols[:, :, None])[:, :, 0]
        rows = 1 / np.where(row_sums > 0, row_sums, 1.0)
        column_sums = (rows[:, None, :] @ p)[:, 0, :]
        cols = target / np.where(column_sums > 0, column_sums, 1.0)
    return cols


def _safe_divisor(sums: Tensor) -> Tensor:
    """Replace sums that are not positive by 1, so that a row or column of zeros remains zero."""
    return torch.where(sums > 0, sums, torch.ones_like(sums))
