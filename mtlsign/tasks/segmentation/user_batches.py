"""Batches of a user's detector in torchvision's form: a list of images, and a list of target mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mtlsign.errors import DataError

#: Dimensions of the entries that detection and its metric read.
_DIMENSIONS = {"boxes": 2, "labels": 1, "masks": 3, "iscrowd": 1}


def is_detection_sample(sample: Any) -> bool:
    """Return whether a sample is a pair of an image and a mapping with boxes."""
    return isinstance(sample, tuple | list) and len(sample) == 2 and _is_target(sample[1])


def is_detection_batch(inputs: Any, targets: Any) -> bool:
    """Return whether a batch has a target with boxes for each image."""
    return isinstance(targets, tuple | list) and bool(targets) and all(map(_is_target, targets))


def _is_target(target: Any) -> bool:
    return isinstance(target, Mapping) and isinstance(target.get("boxes"), Tensor)


def detection_collate(samples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the images and the targets of some samples as two lists."""
    return [sample[0] for sample in samples], [sample[1] for sample in samples]


def padded_images(images: Any) -> Tensor:
    """Return images as one tensor, with zeros at the right and bottom of smaller ones.

    Args:
        images: [n, C, H, W], or a sequence of [C, H, W]; uint8 is divided by 255.

    Raises:
        DataError: something else, or images with several numbers of channels.
    """
    listed = list(images) if isinstance(images, Tensor | tuple | list) else []
    if not listed or not all(isinstance(image, Tensor) and image.ndim == 3 for image in listed):
        raise DataError(
            "The images of a detector must be tensors [C, H, W]. Change the dataset.", field="task"
        )
    if len({len(image) for image in listed}) > 1:
        raise DataError("The images have several numbers of channels. Use one.", field="task")
    height, width = (max(image.shape[dim] for image in listed) for dim in (1, 2))
    plain = [image.float() / 255 if image.dtype == torch.uint8 else image.float() for image in listed]
    return torch.stack(
        [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in plain]
    )


def detection_targets(targets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return targets with the types that torchvision's detectors need.

    Masks are padded to the largest of the batch, as the images are.

    Raises:
        DataError: an entry is missing, or the entries of one image have several lengths.
    """
    checked = [_checked(target) for target in targets]
    masks = [target["masks"] for target in checked if "masks" in target]
    height, width = (max((mask.shape[dim] for mask in masks), default=0) for dim in (1, 2))
    for target in checked:
        if "masks" in target:
            own = target["masks"]
            target["masks"] = F.pad(own, (0, width - own.shape[2], 0, height - own.shape[1]))
    return checked


def _checked(target: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(target.get("labels"), Tensor):
        raise DataError("A target of the detector has no labels. Change the dataset.", field="task")
    count = len(target["labels"])
    for name, dimensions in _DIMENSIONS.items():
        value = target.get(name)
        if value is not None and not (
            isinstance(value, Tensor) and value.ndim == dimensions and len(value) == count
        ):
            raise DataError(
                f"The entry {name!r} of a target does not fit its {count} labels. Correct the dataset.",
                field="task",
            )
    if target["boxes"].shape[1] != 4:
        raise DataError("A box must have four numbers. Correct the dataset.", field="task")
    typed = {"boxes": target["boxes"].float(), "labels": target["labels"].long()}
    if "masks" in target:
        typed["masks"] = target["masks"].to(torch.uint8)
    return {**target, **typed}
