"""A split whose samples lie in memory, with augmentation done on whole batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mtlsign.tasks.base import Batch


@dataclass(frozen=True)
class InputTransform:
    """How samples become inputs: v (over 255 if uint8) minus mean over std, and the random crop and flip.

    `pad` is in pixels (zeros, before normalisation); `mean` and `std` hold one number per channel, or one.
    """

    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    pad: int = 0
    flip: bool = False


@dataclass(frozen=True)
class TensorSplit:
    """`rows` (int64) of `x` (uint8 or float32 [N, C, H, W]) and `y` ([N, ...]); splits share `x` and `y`."""

    x: Tensor
    y: Tensor
    rows: Tensor
    recipe: InputTransform

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> TensorSplit:
        """The same split on `device`; one that already lies there is returned as it is."""
        if self.x.device == torch.device(device):
            return self
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def batch(self, indices: Tensor, augment: Generator | None = None, share: slice | None = None) -> Batch:
        """Samples `indices` of this split: x float32 [n, C, H, W], y [n, ...]; see `Split.batch`."""
        share = share or slice(0, len(indices))
        device = self.x.device
        rows = self.rows[indices[share]].to(device)
        x = self.x[rows]
        if augment is not None and (self.recipe.pad or self.recipe.flip):
            draws = torch.rand(len(indices), 3, generator=augment)[share].to(device)
            x = crop_and_flip(x, draws, self.recipe.pad, self.recipe.flip)
        values = x.float()
        if x.dtype == torch.uint8:
            values = values / 255
        mean = torch.tensor(list(self.recipe.mean), device=device).reshape(1, -1, 1, 1)
        std = torch.tensor(list(self.recipe.std), device=device).reshape(1, -1, 1, 1)
        return (values - mean) / std, self.y[rows]


def crop_and_flip(x: Tensor, draws: Tensor, pad: int, flip: bool) -> Tensor:
    """Shift each image of x [n, C, H, W] by up to `pad` pixels, mirror half; `draws` in [0, 1) [n, 3]."""
    if pad:
        height, width = x.shape[2:]
        windows = F.pad(x, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
        offset = (draws[:, :2] * (2 * pad + 1)).long().clamp(max=2 * pad)
        x = windows[torch.arange(len(x), device=x.device), :, offset[:, 0], offset[:, 1]]
    if flip:
        x = torch.where((draws[:, 2] < 0.5).reshape(-1, 1, 1, 1), x.flip(3), x)
    return x


def tensor_splits(
    x: Tensor, y: Tensor, rows: Mapping[str, Tensor], recipe: InputTransform, test: tuple[Tensor, Tensor]
) -> dict[str, TensorSplit]:
    """The splits named by `rows` over (x, y), and all of `test` as the split `test`."""
    splits = {name: TensorSplit(x, y, chosen, recipe) for name, chosen in rows.items()}
    splits["test"] = TensorSplit(test[0], test[1], torch.arange(len(test[1])), recipe)
    return splits
