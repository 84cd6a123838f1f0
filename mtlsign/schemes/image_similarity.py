"""Structural similarity of images."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

#: Side of the window in pixels.
_WINDOW = 7
#: Stabilising constants of the two quotients for values from 0 to 1.
_C1, _C2 = 0.01**2, 0.03**2


def structural_similarity(images: Tensor, others: Tensor) -> Tensor:
    """Return the mean SSIM of Wang et al. 2004 with uniform windows, with gradients; 1 for equal images.

    Args:
        images: from -1 to 1, [n, C, H, W].
        others: of the same shape.
    """
    x, y = (images + 1) / 2, (others + 1) / 2
    window = min(_WINDOW, *x.shape[2:])
    mean_x, mean_y = F.avg_pool2d(x, window, 1), F.avg_pool2d(y, window, 1)
    variance_x = F.avg_pool2d(x * x, window, 1) - mean_x**2
    variance_y = F.avg_pool2d(y * y, window, 1) - mean_y**2
    covariance = F.avg_pool2d(x * y, window, 1) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean()
