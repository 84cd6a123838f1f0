"""Tasks of files as grey images: `virusshare`, a folder per class, and `files`, from installed packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mtlsign.tasks.base import Task
from mtlsign.tasks.byte_images import files, folders

__all__ = ["NAMES", "load_byte_images"]

_LOADERS: dict[str, Callable[..., Task]] = {
    folders.FOLDER: folders.load_virusshare,
    files.NAME: files.load_files,
}
NAMES = tuple(_LOADERS)


def load_byte_images(name: str, root: Path, *, seed: int, share: float = 1.0) -> Task:
    """Load a task of `NAMES`.

    Args:
        name: name of the data set.
        root: data root.
        seed: division of the training part.
        share: part of the data to keep, 0 to 1: the same files for every seed, classes in proportion.

    Raises:
        DataError: files are missing, damaged or too few.
    """
    return _LOADERS[name](root, seed=seed, share=share)
