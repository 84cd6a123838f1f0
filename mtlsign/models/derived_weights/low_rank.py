"""Kernels whose file has an adapter of low rank for them as well (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from torch import Tensor

from mtlsign.models.derived_weights.companions import Companions, check_size, misfit

#: Suffixes of a number that, divided by the rank, is the factor of the adapter.
ALPHAS = ("lora_alpha", "alpha")


def with_adapter(companions: Companions, kernel: str, down: str, up: str) -> Tensor:
    """Return W + scale·B·A; scale is alpha/r if the file states alpha, else 1.

    Args:
        companions: tensors of the layer.
        kernel: suffix of W, [O, I, ...].
        down: suffix of A, [r, I, ...] with W's further dimensions.
        up: suffix of B, [O, r], or with further dimensions of 1.

    Raises:
        ModelError: the shapes do not fit.
    """
    w, a, b = (companions.numbers(suffix) for suffix in (kernel, down, up))
    product = adapter_product(a, b)
    if product.shape != w.shape:
        raise misfit("An adapter does not fit its kernel")
    return w + product * _scale(companions, rank=len(a))


def adapter_product(down: Tensor, up: Tensor) -> Tensor:
    """Return B·A with the dimensions of A after the first; raises `ModelError` if the ranks differ."""
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != len(down) or up[0, 0].numel() != 1:
        raise misfit("An adapter has factors of different ranks")
    check_size(len(up) * down[0].numel())
    return (up.reshape(len(up), -1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def _scale(companions: Companions, rank: int) -> float:
    """Return alpha/r, or 1."""
    for suffix in ALPHAS:
        if suffix in companions:
            alpha = companions.numbers(suffix)
            if alpha.numel() != 1:
                raise misfit("An adapter has an alpha that is no single number")
            return float(alpha) / rank
    return 1.0
