"""Checked reading of photographs and label images: format, bytes, pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtlsign.errors import DataError
from mtlsign.tasks.text.text_files import damaged_file

MAX_BYTES = 32 * 1024 * 1024
MAX_PIXELS = 32 * 1024 * 1024
#: Errors of Pillow for truncated and altered files.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def read_photograph(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """Return a JPEG or PNG image that is scaled to fit into a frame; see `fitted_size`.

    Args:
        path: the file.
        height: of the frame in pixels.
        width: of the frame in pixels.

    Returns:
        uint8 [3, height, width]; zeros beyond the image.

    Raises:
        DataError: the file is missing, damaged or too large.
    """
    with _opened(path) as image:
        rows, columns = fitted_size(image.height, image.width, height, width)
        picture = _decoded(path, image, "RGB")
    if (rows, columns) != (picture.height, picture.width):
        picture = picture.resize((columns, rows), Image.Resampling.BILINEAR)
    framed = np.zeros((3, height, width), np.uint8)
    framed[:, :rows, :columns] = np.asarray(picture).transpose(2, 0, 1)
    return framed


def read_labels(path: Path) -> NDArray[np.uint8]:
    """Return the numbers of a PNG of grey values or palette entries: uint8 [height, width].

    Raises:
        DataError: the file is missing, damaged, too large or has colours.
    """
    with _opened(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise damaged_file(path, "has colours instead of one number per pixel")
        return np.array(_decoded(path, image, None), np.uint8)


def fitted_size(height: int, width: int, frame_height: int, frame_width: int) -> tuple[int, int]:
    """Return height and width of an image that is scaled to fit into a frame with its proportions."""
    scale = min(frame_height / height, frame_width / width)
    return (
        max(1, min(frame_height, round(height * scale))),
        max(1, min(frame_width, round(width * scale))),
    )


def fit_labels(labels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return label numbers in the frame in which `read_photograph` puts the image.

    Args:
        labels: [rows, columns].
        height: of the frame in pixels.
        width: of the frame in pixels.

    Returns:
        uint8 [height, width], the nearest number of each pixel; zeros beyond the image.
    """
    rows, columns = fitted_size(labels.shape[0], labels.shape[1], height, width)
    framed = np.zeros((height, width), np.uint8)
    nearest_rows = ((np.arange(rows) + 0.5) * labels.shape[0] / rows).astype(int)
    nearest_columns = ((np.arange(columns) + 0.5) * labels.shape[1] / columns).astype(int)
    framed[:rows, :columns] = labels[nearest_rows][:, nearest_columns]
    return framed


def require_equal_sizes(labels: Path, photograph: Path) -> None:
    """Raise `DataError` unless a label image has as many rows and columns as its photograph."""
    with _opened(labels) as first, _opened(photograph) as second:
        if first.size != second.size:
            raise damaged_file(
                labels, f"is {first.height}x{first.width} and its image {second.height}x{second.width}"
            )


def _opened(path: Path) -> Image.Image:
    """Return an image of which only the header is read; the caller closes it."""
    if not path.is_file():
        raise damaged_file(path, "is no file")
    if path.stat().st_size > MAX_BYTES:
        raise damaged_file(path, f"has more than {MAX_BYTES:,} bytes")
    try:
        image = Image.open(path, formats=("JPEG", "PNG"))
    except _DAMAGED:
        raise damaged_file(path, "is no JPEG or PNG image") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise damaged_file(path, f"has more than {MAX_PIXELS:,} pixels")
    return image


def _decoded(path: Path, image: Image.Image, mode: str | None) -> Image.Image:
    try:
        image.load()
        return image if mode is None else image.convert(mode)
    except _DAMAGED as error:
        raise damaged_file(path, f"is damaged ({type(error).__name__})") from None


def listed_files(folder: Path, suffixes: tuple[str, ...], most: int) -> list[Path]:
    """Return the files of a folder with one of the suffixes, sorted by name.

    Raises:
        DataError: the folder is missing or has more than `most` files.
    """
    if not folder.is_dir():
        raise damaged_file(folder, "is no folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if len(paths) > most:
        raise DataError(f"{folder} has more than {most:,} images. Put only the official ones there.",
                        field="data")  # fmt: skip
    return paths
