"""Standardised features: tap outputs with their statistics over the key set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: A coordinate with a smaller standard deviation over the key set is read as 0 (docs/decisions/0001).
MIN_STD = 1e-5


@dataclass(frozen=True)
class Features:
    """Standardised features = centred * inverse_std, kept apart because a linear head need not form the
    product.

    Attributes:
        centred: [N, d].
        inverse_std: [d], 0 where a coordinate is constant over the key set.
    """

    centred: Tensor
    inverse_std: Tensor

    @classmethod
    def from_taps(cls, features: Tensor) -> Features:
        """Compute population statistics over the N rows of [N, d].

        A constant coordinate passes no gradient to its statistics.
        """
        centred, inverse_std = _Standardise.apply(features)
        return cls(centred, inverse_std)

    @property
    def standardised(self) -> Tensor:
        """The product, [N, d]."""
        return self.centred * self.inverse_std


class _Standardise(torch.autograd.Function):
    """Features [N, d] -> (centred, 1/std or 0) in few passes.

    `torch.var_mean` over rows is 20 times slower.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        """Centre the features and invert their standard deviations."""
        centred = features - features.mean(0)
        # The first mean is rounded, so a constant coordinate of any size becomes exactly 0 only here.
        centred -= centred.mean(0)
        variance = (centred * centred).mean(0)
        constant = variance < MIN_STD**2
        inverse = torch.where(
            constant, torch.zeros_like(variance), torch.where(constant, 1.0, variance).rsqrt()
        )
        ctx.save_for_backward(centred, inverse)
        return centred, inverse

    @staticmethod
    def backward(ctx: Any, centred_grad: Tensor, inverse_grad: Tensor) -> Tensor:
        """Return the gradient with respect to the features."""
        centred, inverse = ctx.saved_tensors
        scale = inverse_grad * inverse**3 / -len(centred)
        return torch.addcmul(centred_grad - centred_grad.mean(0), centred, scale)
