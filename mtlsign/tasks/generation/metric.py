"""Frechet distance between generated and real images, on coarse pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Side of the coarse images.
_SIDE = 8


class FrechetQuality:
    """1 - d / v: d is the Frechet distance of coarse pixels, v the variance of the real images.

    The distance of Heusel et al. 2017 (arXiv 1706.08500) is computed from the means of 8x8 squares instead
    of a classifier's features, which are not defined for every data set. The quality is 1 for equal
    distributions and 0 for a generator that always returns the mean image; a worse one has a negative
    quality.

    Args:
        device: device of the state.
        channels: channels of the images.
    """

    def __init__(self, device: torch.device | str = "cpu", *, channels: int) -> None:
        self._size = channels * _SIDE**2
        self.state = torch.zeros(2 * (1 + self._size + self._size**2), dtype=torch.float64, device=device)

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Add generated images (or training outputs that hold them) and real images, [n, C, H, W] each."""
        generated = outputs["images"] if isinstance(outputs, Mapping) else outputs
        sums = [self._sums(images) for images in (generated, targets)]
        self.state += torch.cat(sums).to(self.state)

    def _sums(self, images: Tensor) -> Tensor:
        coarse = F.adaptive_avg_pool2d(images.detach(), _SIDE).flatten(1).double()
        count = torch.tensor([float(len(coarse))], dtype=torch.float64, device=coarse.device)
        return torch.cat([count, coarse.sum(0), (coarse.T @ coarse).flatten()])

    def value(self) -> float:
        """Return the quality; 0 without samples."""
        distance, variance = self._distance()
        return 1 - distance / variance if variance > 0 else 0.0

    def scores(self) -> dict[str, float]:
        """Return the Frechet distance itself."""
        return {"frechet_distance": self._distance()[0]}

    def _distance(self) -> tuple[float, float]:
        """Return the distance and the variance of the real images."""
        (mean, covariance), (real_mean, real_covariance) = map(self._moments, self.state.cpu().chunk(2))
        cross = torch.linalg.eigvals(covariance @ real_covariance).real.clamp(min=0).sqrt().sum()
        variance = real_covariance.trace()
        distance = (mean - real_mean).square().sum() + covariance.trace() + variance - 2 * cross
        return max(0.0, float(distance)), float(variance)

    def _moments(self, state: Tensor) -> tuple[Tensor, Tensor]:
        count = state[0].clamp(min=1)
        mean = state[1 : 1 + self._size] / count
        second = state[1 + self._size :].reshape(self._size, self._size) / count
        return mean, second - mean[:, None] * mean
