"""Splits in memory, with augmentation of whole batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mtlsign.tasks.batch import Batch


@dataclass(frozen=True)
class InputTransform:
    """Normalisation and augmentation of images.

    Values are divided by 255 if they are uint8; then the mean is subtracted and the result divided by the
    standard deviation.

    Attributes:
        mean: one number, or one per channel.
        std: one number, or one per channel.
        pad: pixels of zeros around the image before a random crop; before normalisation.
        flip: whether half of the images are mirrored.
    """

    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    pad: int = 0
    flip: bool = False


@dataclass(frozen=True)
class TensorSplit:
    """Rows of tensors that several splits share.

    Attributes:
        x: uint8 or float32 [N, C, H, W].
        y: [N, ...].
        rows: int64, the rows of this split.
        transform: normalisation and augmentation.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    transform: InputTransform

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> TensorSplit:
        """Return the same split on `device`; self if it is there already."""
        if self.x.device == torch.device(device):
            return self
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        """Return samples by index; see `Split.batch`."""
        part = part or slice(0, len(indices))
        device = self.x.device
        rows = self.rows[indices[part]].to(device)
        x = self.x[rows]
        if augment is not None and (self.transform.pad or self.transform.flip):
            draws = torch.rand(len(indices), 3, generator=augment)[part].to(device)
            x = crop_and_flip(x, draws, self.transform.pad, self.transform.flip)
        values = x.float()
        if x.dtype == torch.uint8:
            values = values / 255
        mean = torch.tensor(list(self.transform.mean), device=device).reshape(1, -1, 1, 1)
        std = torch.tensor(list(self.transform.std), device=device).reshape(1, -1, 1, 1)
        return Batch((values - mean) / std, self.y[rows])


def crop_and_flip(x: Tensor, draws: Tensor, pad: int, flip: bool) -> Tensor:
    """Shift each image by up to `pad` pixels, and mirror half of the images.

    Args:
        x: [n, C, H, W].
        draws: [n, 3] in [0, 1): vertical shift, horizontal shift, mirroring.
        pad: largest shift in pixels.
        flip: whether to mirror images.
    """
    if pad:
        height, width = x.shape[2:]
        windows = F.pad(x, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
        offset = (draws[:, :2] * (2 * pad + 1)).long().clamp(max=2 * pad)
        x = windows[torch.arange(len(x), device=x.device), :, offset[:, 0], offset[:, 1]]
    if flip:
        x = torch.where((draws[:, 2] < 0.5).reshape(-1, 1, 1, 1), x.flip(3), x)
    return x


def tensor_splits(
    x: Tensor, y: Tensor, rows: Mapping[str, Tensor], transform: InputTransform, test: tuple[Tensor, Tensor]
) -> dict[str, TensorSplit]:
    """Build the splits of a task in memory.

    Args:
        x: uint8 or float32 [N, C, H, W].
        y: [N, ...].
        rows: rows (int64) of each split over (x, y).
        transform: normalisation and augmentation of all splits.
        test: images and targets of the split `test`.
    """
    splits = {name: TensorSplit(x, y, chosen, transform) for name, chosen in rows.items()}
    splits["test"] = TensorSplit(test[0], test[1], torch.arange(len(test[1])), transform)
    return splits
