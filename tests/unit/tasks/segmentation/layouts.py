"""Tiny folders in the official layouts of CamVid, Penn-Fudan and Pascal VOC 2012."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64
#: Rows and columns of two objects that do not touch.
FIRST, SECOND = (slice(4, 20), slice(6, 26)), (slice(24, 44), slice(36, 60))


def photograph(path: Path, index: int) -> None:
    """Write an image whose two objects differ from the background."""
    gen = np.random.default_rng(index)
    pixels = gen.integers(0, 60, (HEIGHT, WIDTH, 3), np.uint8)
    pixels[FIRST] += np.array([150, 0, 0], np.uint8)
    pixels[SECOND] += np.array([0, 150, 0], np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def label_image(path: Path, values: tuple[int, int], *, border: bool = False, palette: bool = False) -> None:
    """Write a label image with one number for each of the two objects."""
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[FIRST], numbers[SECOND] = values
    if border:
        numbers[FIRST[0].start, FIRST[1]] = 255
    image = Image.fromarray(numbers)
    if palette:
        image = Image.frombytes("P", image.size, numbers.tobytes())
        image.putpalette([value for k in range(256) for value in (k, 255 - k, k)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_camvid(root: Path, counts: Sequence[int] = (12, 2, 2), folder: str = "CamVid") -> None:
    """Write parts of CamVid; the objects are a car (8) and a pedestrian (9)."""
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        for index in range(count):
            photograph(root / folder / part / f"frame_{index:03}.png", index)
            label_image(root / folder / f"{part}annot" / f"frame_{index:03}.png", (8, 9))


def write_pennfudan(root: Path, count: int = 20) -> None:
    """Write pedestrians with the grey values 1 and 2."""
    for index in range(count):
        photograph(root / "PennFudanPed/PNGImages" / f"FudanPed{index:05}.png", index)
        label_image(root / "PennFudanPed/PedMasks" / f"FudanPed{index:05}_mask.png", (1, 2))


def write_voc(root: Path, counts: Sequence[int] = (12, 3), *, objects: bool = True) -> None:
    """Write an aeroplane (class 1), and a person (class 15) that is difficult."""
    base, names = root / "VOCdevkit/VOC2012", iter(range(10**6))
    for part, count in zip(("train", "val"), counts, strict=True):
        own = [f"2007_{next(names):06}" for _ in range(count)]
        lists = base / "ImageSets/Segmentation" / f"{part}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        lists.write_text("\n".join(own) + "\n")
        for index, name in enumerate(own):
            photograph(base / "JPEGImages" / f"{name}.jpg", index)
            label_image(base / "SegmentationClass" / f"{name}.png", (1, 15), border=True, palette=True)
            if objects:
                label_image(base / "SegmentationObject" / f"{name}.png", (1, 2), border=True, palette=True)
                write_annotation(base / "Annotations" / f"{name}.xml", ("aeroplane", "person"))


def write_annotation(path: Path, names: Sequence[str]) -> None:
    """Write the XML of an image; its second object is difficult."""
    entries = "".join(
        f"<object><name>{name}</name><difficult>{int(k == 1)}</difficult></object>"
        for k, name in enumerate(names)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{path.stem}.jpg</filename>{entries}</annotation>")
