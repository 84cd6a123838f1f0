"""Images with instances of objects: one number per pixel, and a class for each number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Generator, Tensor

from mtlsign.tasks.batch import Batch

#: Most instances of an image; each pixel stores the number of one in a byte.
MAX_INSTANCES = 254
#: Fewest pixels of an instance, and smallest height and width, after the image is scaled.
MIN_PIXELS, MIN_SIDE = 30, 4


@dataclass(frozen=True)
class Instances:
    """Instances of one image.

    Attributes:
        numbers: uint8 [H, W]: 0 for the background, k for instance k.
        labels: class of each instance, from 1.
        crowd: whether an instance is not trained, and a detection of it is no error.
    """

    numbers: NDArray[np.uint8]
    labels: tuple[int, ...]
    crowd: tuple[bool, ...]

    def without_small(self) -> Instances:
        """Return the instances that have `MIN_PIXELS` and `MIN_SIDE`, numbered again."""
        numbers = np.zeros_like(self.numbers)
        labels, crowd = [], []
        for index, box in enumerate(ndimage.find_objects(self.numbers, max_label=len(self.labels))):
            if box is None or min(part.stop - part.start for part in box) < MIN_SIDE:
                continue
            inside = self.numbers[box] == index + 1
            if inside.sum() >= MIN_PIXELS:
                labels.append(self.labels[index])
                crowd.append(self.crowd[index])
                numbers[box][inside] = len(labels)
        return Instances(numbers, tuple(labels), tuple(crowd))


def connected_regions(classes: NDArray[np.uint8], labels: Mapping[int, int]) -> Instances:
    """Return the connected regions of classes as instances; objects that touch become one.

    Args:
        classes: uint8 [H, W], the class of each pixel.
        labels: class in the image -> label of the task, from 1. Other classes are background.

    Returns:
        The largest `MAX_INSTANCES` regions, with eight neighbours of a pixel.
    """
    regions: list[tuple[int, int, NDArray[np.bool_]]] = []
    for value, label in labels.items():
        labelled, count = ndimage.label(classes == value, structure=np.ones((3, 3)))
        sizes = np.bincount(labelled.ravel(), minlength=count + 1)
        regions += [
            (int(sizes[k]), label, labelled == k) for k in range(1, count + 1) if sizes[k] >= MIN_PIXELS
        ]
    regions = sorted(regions, key=lambda region: -region[0])[:MAX_INSTANCES]
    numbers = np.zeros(classes.shape, np.uint8)
    for index, (_, _, mask) in enumerate(regions):
        numbers[mask] = index + 1
    return Instances(numbers, tuple(label for _, label, _ in regions), (False,) * len(regions))


@dataclass(frozen=True)
class InstanceSplit:
    """Rows of images in memory that several splits share.

    Attributes:
        images: uint8 [N, 3, H, W].
        instances: one entry for each image.
        rows: int64, the rows of this split.
        device: device of the batches.
    """

    images: Tensor
    instances: Sequence[Instances]
    rows: Tensor
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> InstanceSplit:
        """Return the same split with batches on `device`."""
        return replace(self, device=device)

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        """Return samples by index; see `Split.batch`. With `augment`, half of the images are mirrored.

        The targets are a list with a mapping for each image: `boxes` float32 [k, 4] (left, top, right,
        bottom), `labels` int64 [k], `masks` uint8 [k, H, W] and `iscrowd` bool [k].
        """
        part = part or slice(0, len(indices))
        rows = self.rows[indices[part]]
        mirrored = torch.zeros(len(indices), dtype=torch.bool)
        if augment is not None:
            mirrored = torch.rand(len(indices), generator=augment) < 0.5
        flips = mirrored[part]
        images = self.images[rows].float() / 255
        images = torch.where(flips.reshape(-1, 1, 1, 1), images.flip(3), images)
        targets = [
            instance_targets(self.instances[row], flip=flip)
            for row, flip in zip(rows.tolist(), flips.tolist(), strict=True)
        ]
        return Batch(images, targets).to(self.device)


def instance_targets(instances: Instances, *, flip: bool = False) -> dict[str, Tensor]:
    """Return the target of one image as torchvision's detectors read it; see `InstanceSplit.batch`."""
    numbers = instances.numbers[:, ::-1] if flip else instances.numbers
    slices = ndimage.find_objects(numbers, max_label=len(instances.labels))
    boxes = [[box[1].start, box[0].start, box[1].stop, box[0].stop] for box in slices if box is not None]
    ids = np.arange(1, len(instances.labels) + 1, dtype=np.uint8)
    masks = (numbers[None] == ids[:, None, None]).astype(np.uint8)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(instances.labels, dtype=torch.int64),
        "masks": torch.from_numpy(masks),
        "iscrowd": torch.tensor(instances.crowd, dtype=torch.bool),
    }
