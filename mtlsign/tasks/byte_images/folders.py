"""Task `virusshare`: one folder per class, such as the samples of VirusShare sorted by family.

The layout is `DATA/virusshare/CLASS/FILE`. Classes are numbered in the order of their folders' names. Files
with the same content count once. A fifth of the contents of every class, those with the smallest SHA-256, is
the test part. Files are read and never executed. Links are not followed, and hidden files are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtlsign.errors import DataError
from mtlsign.tasks.base import Task
from mtlsign.tasks.byte_images.image_set import (
    SIDE,
    ImageSet,
    image_set_path,
    image_task,
    listing_digest,
    read_image_set,
    write_image_set,
)
from mtlsign.tasks.byte_images.malimg import MAX_BYTES, MIN_BYTES, byte_image, read_regular_file

FOLDER = "virusshare"
MIN_CLASSES = 2
#: Smallest number of different files of a class.
MIN_FILES = 20
#: Most files of all classes: their images take 4 KiB each.
MAX_FILES = 1_000_000
TEST = 0.2


@dataclass(frozen=True)
class _Sample:
    """File of a class, as the folder lists it: its content has not been read."""

    label: int
    path: str
    size: int
    changed_ns: int


def load_virusshare(root: Path, *, seed: int, share: float = 1.0) -> Task:
    """Load the files below `DATA/virusshare` as images.

    Args:
        root: data root.
        seed: division of the training part.
        share: part of the data to keep, 0 to 1: the same files for every seed, classes in proportion.

    Raises:
        DataError: the folder is missing, or has too few classes or files.
    """
    folder = root / FOLDER
    classes = _class_names(folder)
    samples = _listed_samples(folder, classes)
    fields = [[sample.label, sample.path, sample.size, sample.changed_ns] for sample in samples]
    path = image_set_path(root, FOLDER, listing_digest(json.dumps([str(folder), classes, fields]).encode()))
    images = read_image_set(path, len(classes))
    if images is None:
        images = _read_images(folder, classes, samples)
        write_image_set(path, images)
    return image_task(FOLDER, images, len(classes), seed=seed, share=share)


def _class_names(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`. Links and hidden folders are no classes."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _is_class_folder(entry))
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read ({error.strerror}). Put one folder of files per class there, or give "
            "another folder with --data.",
            field="data",
        ) from None
    if len(names) < MIN_CLASSES:
        raise DataError(
            f"{folder} has {len(names)} folders. Put at least {MIN_CLASSES} there, one per class.",
            field="data",
        )
    return names


def _listed_samples(folder: Path, classes: list[str]) -> list[_Sample]:
    """Return the regular files of at least `MIN_BYTES`; links, pipes and devices are not listed."""
    samples: list[_Sample] = []
    for label, name in enumerate(classes):
        try:
            with os.scandir(folder / name) as entries:
                files = [(e.path, e.stat(follow_symlinks=False)) for e in entries if _is_file(e)]
        except OSError as error:
            raise DataError(
                f"{folder / name!r} cannot be read ({error.strerror}). Grant read permission.", field="data"
            ) from None
        samples += [
            _Sample(label, path, status.st_size, status.st_mtime_ns)
            for path, status in sorted(files)
            if status.st_size >= MIN_BYTES
        ]
        if len(samples) > MAX_FILES:
            raise DataError(f"{folder} has over {MAX_FILES:,} files. Remove some.", field="data")
    return samples


def _is_class_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False) and not entry.name.startswith(".")


def _read_images(folder: Path, classes: list[str], samples: list[_Sample]) -> ImageSet:
    """Read the files, and keep each content once, in the order of classes and SHA-256."""
    images: dict[tuple[int, str], np.ndarray] = {}
    unreadable = cut = 0
    for sample in samples:
        content = read_regular_file(sample.path)
        if content is None or len(content) < MIN_BYTES:
            unreadable += 1
            continue
        cut += sample.size > MAX_BYTES
        key = (sample.label, hashlib.sha256(content).hexdigest())
        if key not in images:
            images[key] = byte_image(content, SIDE)
    class_counts = Counter(digest for _, digest in images)
    keys = sorted(key for key in images if class_counts[key[1]] == 1)
    _warn_of_files(folder, unreadable, cut, sum(count > 1 for count in class_counts.values()))
    counts = Counter(label for label, _ in keys)
    for label, name in enumerate(classes):
        if counts[label] < MIN_FILES:
            raise DataError(
                f"{str(folder / name)!r} has {counts[label]} different files of at least {MIN_BYTES} bytes. "
                f"Put at least {MIN_FILES} there, or remove the folder.",
                field="data",
            )
    positions = [position for label in range(len(classes)) for position in range(counts[label])]
    in_test = [
        position < round(TEST * counts[label]) for position, (label, _) in zip(positions, keys, strict=True)
    ]
    return ImageSet(
        np.stack([images[key] for key in keys]),
        np.array([label for label, _ in keys], np.int64),
        np.array(in_test, np.bool_),
    )


def _warn_of_files(folder: Path, unreadable: int, cut: int, ambiguous: int) -> None:
    """Warn of files that are not used, or not completely."""
    for count, problem in (
        (unreadable, "cannot be read and are skipped"),
        (cut, f"are larger than {MAX_BYTES:,} bytes, and the bytes after them are not used"),
        (ambiguous, "occur in several classes and are skipped"),
    ):
        if count:
            warnings.warn(f"Files in {folder} that {problem}: {count:,}.", stacklevel=2)
