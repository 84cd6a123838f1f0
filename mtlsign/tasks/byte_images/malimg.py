"""Grey images of a file's bytes, after the convention of Malimg (Nataraj et al. 2011).

Rule, for a file of n bytes, of which at most `MAX_BYTES` are read:

1. One byte is one pixel, 0 black and 255 white. The width w follows from n by `WIDTHS`.
2. The image has h = n // w rows. The last n - h * w bytes are not used.
3. The image becomes a square of `side` pixels. Each new pixel covers a rectangle of h / side rows and
   w / side columns. Its value is the mean of the old pixels, weighted by their areas inside the rectangle.
   The mean is an exact fraction, rounded to the nearest integer, halves upwards.

No number is floating-point, so that the same bytes give the same image on every machine. Files are data: they
are read, and never executed, imported or unpacked.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: Widths of images by the size of the file: (size in bytes below which it applies, width).
WIDTHS = (
    (10 * 1024, 32),
    (30 * 1024, 64),
    (60 * 1024, 128),
    (100 * 1024, 256),
    (200 * 1024, 384),
    (500 * 1024, 512),
    (1000 * 1024, 768),
)
LARGEST_WIDTH = 1024
#: Smallest file that becomes an image.
MIN_BYTES = 1024
#: Bytes of a larger file after these are not read.
MAX_BYTES = 64 * 1024 * 1024

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def image_width(size: int) -> int:
    """Return the width of the image of a file of `size` bytes, before it becomes a square."""
    return next((width for limit, width in WIDTHS if size < limit), LARGEST_WIDTH)


def byte_image(content: bytes, side: int) -> NDArray[np.uint8]:
    """Return the image of a file's content; see the module's docstring.

    Args:
        content: at least `MIN_BYTES` bytes.
        side: height and width of the image in pixels.

    Returns:
        uint8 [side, side].
    """
    width = image_width(len(content))
    height = len(content) // width
    pixels = np.frombuffer(content, np.uint8, height * width).reshape(height, width)
    sums = _covered_sums(_covered_sums(pixels, side).T, side).T
    area = height * width
    return ((2 * sums + area) // (2 * area)).astype(np.uint8)


def _covered_sums(rows: NDArray[np.integer], side: int) -> NDArray[np.int64]:
    """Return `side` times the sum of each of `side` equal parts of the rows: int64 [side, columns]."""
    count = len(rows)
    sums = np.empty((side, rows.shape[1]), np.int64)
    for part in range(side):
        start, before = divmod(part * count, side)
        stop, after = divmod((part + 1) * count, side)
        sums[part] = side * rows[start:stop].sum(axis=0, dtype=np.int64)
        sums[part] -= before * rows[start].astype(np.int64)
        if after:
            sums[part] += after * rows[stop].astype(np.int64)
    return sums


def read_regular_file(path: str | Path, limit: int = MAX_BYTES) -> bytes | None:
    """Return the first `limit` bytes of a regular file; None for links, other kinds and unreadable files."""
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    except OSError:
        return None
    finally:
        os.close(descriptor)
