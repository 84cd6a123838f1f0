"""Task `files`: the types of harmless files of the packages that are installed on this machine.

Other machines have other packages, and so the data differ. `DATA/byte-images/files.json` lists the chosen
files; its SHA-256 identifies the data set. A later run reads the same list, and so uses the same data. The
images are stored next to it, because packages are updated.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from mtlsign.errors import DataError
from mtlsign.storage.local import atomic_write
from mtlsign.tasks.base import Task
from mtlsign.tasks.byte_images.image_set import (
    CACHE_FOLDER,
    SIDE,
    ImageSet,
    image_set_path,
    image_task,
    listing_digest,
    read_image_set,
    write_image_set,
)
from mtlsign.tasks.byte_images.installed_packages import installed_files
from mtlsign.tasks.byte_images.malimg import byte_image, read_regular_file
from mtlsign.tasks.byte_images.manifest import MANIFEST_LIMIT, Manifest, build_manifest, parse_manifest

NAME = "files"
MANIFEST = f"{CACHE_FOLDER}/{NAME}.json"


def load_files(root: Path, *, seed: int, share: float = 1.0) -> Task:
    """Load the files of the manifest as images; the first call chooses them and writes the manifest.

    Args:
        root: data root.
        seed: division of the training part.
        share: part of the data to keep, 0 to 1: the same files for every seed, classes in proportion.

    Raises:
        DataError: the manifest is damaged or cannot be written, or its files have changed and their images
            are not stored.
    """
    path = root / MANIFEST
    content = _manifest_bytes(path)
    manifest = parse_manifest(content, str(path))
    images_path = image_set_path(root, NAME, listing_digest(content))
    images = read_image_set(images_path, len(manifest.classes))
    if images is None or not np.array_equal(images.labels, _labels(manifest)):
        images = _read_images(manifest, path)
        write_image_set(images_path, images)
    task = image_task(NAME, images, len(manifest.classes), seed=seed, share=share)
    return replace(task, data_digest=hashlib.sha256(content).hexdigest())


def _manifest_bytes(path: Path) -> bytes:
    """Return the file of the manifest, after it was written if there is none."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            manifest = build_manifest(installed_files()).to_bytes()
            with suppress(FileExistsError):  # another process wrote it
                atomic_write(path, manifest, exclusive=True)
        except OSError as error:
            raise DataError(
                f"{path} cannot be written ({error.strerror}). Give a writable folder with --data.",
                field="data",
            ) from None
    content = read_regular_file(path, MANIFEST_LIMIT + 1)
    if content is None:
        raise DataError(f"{path} is no readable file. Remove it; the next run writes another.", field="data")
    return content


def _labels(manifest: Manifest) -> np.ndarray:
    return np.array([entry.label for entry in manifest.entries], np.int64)


def _read_images(manifest: Manifest, path: Path) -> ImageSet:
    """Read the files of the manifest. Raises `DataError` if one has changed."""
    images = np.empty((len(manifest.entries), SIDE, SIDE), np.uint8)
    changed = []
    for image, entry in zip(images, manifest.entries, strict=True):
        content = read_regular_file(entry.path)
        if content is None or hashlib.sha256(content).hexdigest() != entry.sha256:
            changed.append(entry.path)
        else:
            image[:] = byte_image(content, SIDE)
    if changed:
        raise DataError(
            f"{len(changed):,} of {len(images):,} files have changed since {path} was written, such as "
            f"{changed[0]!r}. Install the former packages, or remove the manifest to use other data.",
            field="data",
        )
    in_test = np.array([entry.in_test for entry in manifest.entries], np.bool_)
    return ImageSet(images, _labels(manifest), in_test)
