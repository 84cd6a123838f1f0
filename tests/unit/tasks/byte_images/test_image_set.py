from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtlsign.tasks.byte_images.image_set import (
    ImageSet,
    image_set_path,
    listing_digest,
    read_image_set,
    write_image_set,
)


def example(count: int = 3, side: int = 64, label: int = 1) -> ImageSet:
    images = np.arange(count * side * side).reshape(count, side, side).astype(np.uint8)
    return ImageSet(images, np.full(count, label, np.int64), np.array([False] * (count - 1) + [True]))


def test_read_image_set_returns_written_images(tmp_path: Path) -> None:
    path = image_set_path(tmp_path, "files", listing_digest(b"list"))
    write_image_set(path, example())
    stored = read_image_set(path, 2)
    assert stored is not None and np.array_equal(stored.images, example().images)
    assert stored.labels.tolist() == [1, 1, 1] and stored.in_test.tolist() == [False, False, True]


@pytest.mark.parametrize("images", [example(side=32), example(label=2), example(label=-1)])
def test_read_image_set_of_other_shape_or_class_returns_none(tmp_path: Path, images: ImageSet) -> None:
    write_image_set(tmp_path / "a.npz", images)
    assert read_image_set(tmp_path / "a.npz", 2) is None


def test_read_image_set_never_unpickles(tmp_path: Path) -> None:
    objects = np.array([{}, {}, {}], object)
    np.savez(tmp_path / "a.npz", images=objects, labels=objects, in_test=objects)
    assert read_image_set(tmp_path / "a.npz", 2) is None


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x93NUMPY", b"text"])
def test_read_image_set_of_damaged_file_returns_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    assert read_image_set(tmp_path / "a.npz", 2) is None
    assert read_image_set(tmp_path / "missing.npz", 2) is None


def test_write_image_set_without_folder_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    write_image_set(tmp_path / "file" / "a.npz", example())
    assert not (tmp_path / "file" / "a.npz").exists()
