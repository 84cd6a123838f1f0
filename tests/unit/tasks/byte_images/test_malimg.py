from __future__ import annotations

import os
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest

from mtlsign.tasks.byte_images.malimg import byte_image, image_width, read_regular_file
from tests.unit.tasks.byte_images.layouts import content


@pytest.mark.parametrize(
    ("size", "width"),
    [
        (1024, 32),
        (10 * 1024 - 1, 32),
        (10 * 1024, 64),
        (30 * 1024, 128),
        (60 * 1024, 256),
        (100 * 1024, 384),
        (200 * 1024, 512),
        (500 * 1024, 768),
        (1000 * 1024 - 1, 768),
        (1000 * 1024, 1024),
        (2**40, 1024),
    ],
)
def test_image_width_follows_table(size: int, width: int) -> None:
    assert image_width(size) == width


def overlaps(count: int, side: int) -> np.ndarray:
    """Return the length of row i inside part p of `count` rows, in units of 1 / side: int64 [side, count]."""
    return np.array(
        [
            [max(0, min((p + 1) * count, (i + 1) * side) - max(p * count, i * side)) for i in range(count)]
            for p in range(side)
        ]
    )


def area_mean(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return the resized image by matrices of overlaps, rounded as fractions."""
    height, width = pixels.shape
    sums = overlaps(height, side) @ pixels.astype(np.int64) @ overlaps(width, side).T
    means = [[Fraction(int(total), height * width) for total in row] for row in sums]
    return np.array([[floor(mean + Fraction(1, 2)) for mean in row] for row in means])


@pytest.mark.parametrize(("size", "side"), [(1024, 5), (1055, 7), (1700, 32), (1500, 40), (11_000, 9)])
def test_byte_image_is_mean_of_covered_areas(size: int, side: int) -> None:
    data = content(size, size)
    width = 32 if size < 10_240 else 64
    pixels = np.frombuffer(data, np.uint8)[: size // width * width].reshape(-1, width)
    image = byte_image(data, side)
    assert image.dtype == np.uint8 and image.shape == (side, side)
    assert np.array_equal(image, area_mean(pixels, side))


def test_byte_image_of_whole_blocks_is_rounded_mean() -> None:
    pixels = np.zeros((32, 32), np.uint8)
    pixels[0, 0], pixels[0, 2], pixels[0, 3] = 2, 1, 5  # means 0.5, 1.5 and 0
    assert byte_image(pixels.tobytes(), 16)[0, :3].tolist() == [1, 2, 0]
    assert (byte_image(b"\xff" * 5000, 64) == 255).all()


def test_byte_image_of_largest_width_has_shape() -> None:
    data = content(1, 1024 * 1500 + 17)
    blocks = np.frombuffer(data, np.uint8)[: 1500 * 1024].reshape(4, 375, 4, 256)
    expected = np.floor(blocks.mean(axis=(1, 3)) + 0.5)
    assert np.array_equal(byte_image(data, 4), expected)


def test_read_regular_file_reads_up_to_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcdef")
    assert read_regular_file(tmp_path / "file") == b"abcdef"
    assert read_regular_file(tmp_path / "file", 4) == b"abcd"


def test_read_regular_file_of_other_kinds_returns_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    paths = [tmp_path / "link", tmp_path / "pipe", tmp_path, tmp_path / "missing", "/dev/zero", "a\0b"]
    assert [read_regular_file(path) for path in paths] == [None] * 6
