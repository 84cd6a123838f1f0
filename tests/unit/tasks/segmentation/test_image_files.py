from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtlsign.errors import DataError
from mtlsign.tasks.segmentation import image_files
from mtlsign.tasks.segmentation.image_files import (
    fit_labels,
    fitted_size,
    listed_files,
    read_labels,
    read_photograph,
    require_equal_sizes,
)


def test_fitted_size_keeps_proportions() -> None:
    assert fitted_size(375, 500, 256, 256) == (192, 256)
    assert fitted_size(1, 10_000, 64, 64) == (1, 64)


def test_fit_labels_takes_the_nearest_number() -> None:
    labels = np.repeat(np.repeat(np.array([[1, 2], [3, 4]], np.uint8), 10, 0), 20, 1)
    framed = fit_labels(labels, 8, 8)
    assert framed[:4].tolist() == [[1] * 4 + [2] * 4] * 2 + [[3] * 4 + [4] * 4] * 2
    assert not framed[4:].any()


def test_read_photograph_scales_into_the_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 20), (10, 20, 30)).save(path)
    pixels = read_photograph(path, 16, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels[:, :8].reshape(3, -1).T.tolist() == [[10, 20, 30]] * 128 and not pixels[:, 8:].any()


def test_read_photograph_refuses_too_many_pixels_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (40, 20)).save(path)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 799)
    with pytest.raises(DataError, match="more than 799 pixels"):
        read_photograph(path, 16, 16)
    monkeypatch.setattr(image_files, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="more than 10 bytes"):
        read_labels(path)


def test_read_labels_refuses_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path, format="GIF")
    with pytest.raises(DataError, match="is no JPEG or PNG"):
        read_labels(path)


def test_require_equal_sizes_names_both(tmp_path: Path) -> None:
    Image.new("L", (4, 5)).save(tmp_path / "a.png")
    Image.new("RGB", (6, 5)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="is 5x4 and its image 5x6"):
        require_equal_sizes(tmp_path / "a.png", tmp_path / "b.png")


def test_listed_files_has_a_limit(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG", "c.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in listed_files(tmp_path, (".png",), 2)] == ["a.PNG", "b.png"]
    with pytest.raises(DataError, match="more than 1 images"):
        listed_files(tmp_path, (".png",), 1)
