"""Kernels that PyTorch computes from other parameters: weight norm, spectral norm and pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlsign.models.checkpoints import FLOATS
from mtlsign.models.derived_weights.companions import Companions, misfit


def weight_norm(companions: Companions, magnitude: str, direction: str) -> Tensor:
    """Return g · v / ‖v‖; the norm is over the dimensions in which g has one entry.

    Args:
        companions: tensors of the layer.
        magnitude: suffix of g, which has no dimensions, or those of v with at most one longer than 1.
        direction: suffix of v.

    Raises:
        ModelError: the shapes do not fit, or a norm is 0.
    """
    g, v = companions.numbers(magnitude), companions.numbers(direction)
    _check_dimensions(v)
    if g.ndim == 0:
        g = g.reshape([1] * v.ndim)
    longer = [dimension for dimension, size in enumerate(g.shape) if size != 1]
    if g.ndim != v.ndim or len(longer) > 1 or any(g.shape[d] != v.shape[d] for d in longer):
        raise misfit("A weight norm's magnitude does not fit its direction")
    axes = [dimension for dimension, size in enumerate(g.shape) if size == 1]
    norms = torch.linalg.vector_norm(v, dim=axes, keepdim=True, dtype=torch.float64)
    if not bool((norms > 0).all()):
        raise misfit("A weight norm has a direction of zeros")
    factors: Tensor = (g / norms).to(torch.float32)
    return v * factors


def spectral_norm(companions: Companions, kernel: str, left: str, right: str) -> Tensor:
    """Return W / σ with σ = uᵀ·W·v, where W has one row for each output channel.

    Args:
        companions: tensors of the layer.
        kernel: suffix of W.
        left: suffix of u, with one entry for each row.
        right: suffix of v, with one entry for each column.

    Raises:
        ModelError: the shapes do not fit, or σ is 0.
    """
    values, u, v = (companions.numbers(suffix) for suffix in (kernel, left, right))
    _check_dimensions(values)
    rows = values.flatten(1)
    if u.shape != rows.shape[:1] or v.shape != rows.shape[1:]:
        raise misfit("A spectral norm's vectors do not fit its kernel")
    sigma = float((u.double() * (rows.double() @ v.double())).sum())
    if sigma == 0:
        raise misfit("A spectral norm is 0")
    return values / sigma


def pruned(companions: Companions) -> Tensor:
    """Return W · mask. Raises `ModelError` if the shapes differ."""
    values = companions.numbers("weight_orig")
    mask = companions.numbers("weight_mask", (*FLOATS, torch.bool, torch.uint8))
    if values.shape != mask.shape:
        raise misfit("A pruning mask does not fit its kernel")
    return values * mask


def _check_dimensions(kernel: Tensor) -> None:
    if kernel.ndim < 2:
        raise misfit("A reparametrised kernel has fewer than two dimensions")
