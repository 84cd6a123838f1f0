"""Labelled byte images, their file, and the task that they make."""

from __future__ import annotations

import hashlib
import io
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtlsign.models.input_spec import ImageSpec
from mtlsign.storage.local import atomic_write
from mtlsign.tasks.base import Task
from mtlsign.tasks.splitting import share_of_rows, split_training_rows
from mtlsign.tasks.tensor_split import InputTransform, tensor_splits

#: Height and width of the images in pixels.
SIDE = 64
#: Folder of manifests and images below the data root.
CACHE_FOLDER = "byte-images"
TRANSFORM = InputTransform((0.32,), (0.16,))

_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class ImageSet:
    """Images of files.

    Attributes:
        images: uint8 [n, SIDE, SIDE].
        labels: int64 [n], the class of each image.
        in_test: bool [n], true for the images of the test part.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    in_test: NDArray[np.bool_]


def image_set_path(root: Path, name: str, digest: str) -> Path:
    """Return the file of the images of a data set.

    Args:
        root: data root.
        name: the data set.
        digest: SHA-256 of its list of files, in hexadecimal.
    """
    return root / CACHE_FOLDER / f"{name}-{digest[:32]}.npz"


def write_image_set(path: Path, images: ImageSet) -> None:
    """Write the images as a file that its owner alone can read; do nothing in a folder without permission."""
    buffer = io.BytesIO()
    np.savez(buffer, images=images.images, labels=images.labels, in_test=images.in_test)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, buffer.getvalue())


def read_image_set(path: Path, classes: int) -> ImageSet | None:
    """Return the images of a file; None if it is missing or damaged, so that the caller makes them again.

    Args:
        path: file of `write_image_set`.
        classes: number of classes.
    """
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            stored = ImageSet(arrays["images"], arrays["labels"], arrays["in_test"])
    except _DAMAGED:
        return None
    count = len(stored.labels) if stored.labels.ndim == 1 else 0
    shapes = (stored.images.shape, stored.in_test.shape)
    types = [array.dtype.name for array in (stored.images, stored.labels, stored.in_test)]
    if shapes != ((count, SIDE, SIDE), (count,)) or types != ["uint8", "int64", "bool"]:
        return None
    if not count or stored.labels.min() < 0 or stored.labels.max() >= classes:
        return None
    return stored


def listing_digest(text: bytes) -> str:
    """Return SHA-256 in hexadecimal of a list of files and of the size of the images."""
    return hashlib.sha256(b"mtlsign/byte-images/v1\0%d\0" % SIDE + text).hexdigest()


def image_task(name: str, images: ImageSet, classes: int, *, seed: int, share: float) -> Task:
    """Build a task; `seed` divides the training part, and the test part is the same for every seed.

    Args:
        name: the data set.
        images: its images.
        classes: number of classes.
        seed: division of the training part.
        share: part of the data to keep, 0 to 1: the same files for every seed, classes in proportion.
    """
    x, y = torch.from_numpy(images.images).unsqueeze(1), torch.from_numpy(images.labels)
    in_test = torch.from_numpy(images.in_test)
    train, test = (x[~in_test], y[~in_test]), (x[in_test], y[in_test])
    if share < 1:
        train, test = _part(name, *train, share), _part(name, *test, share)
        name = f"{name}@{share:g}"
    splits = tensor_splits(*train, split_training_rows(train[1], seed), TRANSFORM, test)
    return Task(name, ImageSpec(1, SIDE, SIDE, classes), splits)


def _part(name: str, x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    rows = share_of_rows(name, y, share)
    return x[rows].contiguous(), y[rows]
