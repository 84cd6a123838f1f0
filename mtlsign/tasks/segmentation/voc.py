"""Pascal VOC 2012 in the official layout below `VOCdevkit/VOC2012`.

| folder or file | content |
|---|---|
| `ImageSets/Segmentation/train.txt`, `val.txt` | names of the images; val is the test part here |
| `JPEGImages` | photographs |
| `SegmentationObject` | palette images with the number of the instance of each pixel, 255 at borders |
| `SegmentationClass` | palette images with the class of each pixel, 255 at borders |
| `Annotations` | XML; instance k is the k-th object |

A copy without `SegmentationObject` has no instances. They are then the connected regions of each class, so
that objects of one class that touch become one.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtlsign.tasks.segmentation.image_files import fit_labels, read_labels
from mtlsign.tasks.segmentation.instances import MAX_INSTANCES, Instances, connected_regions
from mtlsign.tasks.segmentation.sources import Sample
from mtlsign.tasks.text.text_files import damaged_file, read_lines, read_text, require_present

FOLDER = "VOCdevkit/VOC2012"
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_BORDER = 255
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_XML = 1024 * 1024
_MAX_IMAGES = 20_000


def voc_samples(root: Path) -> dict[str, list[Sample]]:
    """Return the samples of the parts train and test, which is the official val.

    Raises:
        DataError: files are missing, or a list holds something else than names.
    """
    lists = {"train": "train.txt", "test": "val.txt"}
    paths = [f"{FOLDER}/ImageSets/Segmentation/{name}" for name in lists.values()]
    paths += [f"{FOLDER}/JPEGImages", f"{FOLDER}/SegmentationClass"]
    require_present("voc", root, paths, "VOCtrainval_11-May-2012.tar")
    folder = root / FOLDER
    return {
        part: [_sample(folder, name) for name in _names(folder / "ImageSets/Segmentation" / file)]
        for part, file in lists.items()
    }


def _names(path: Path) -> list[str]:
    names = []
    for number, line in read_lines(path, max_lines=_MAX_IMAGES, max_line_bytes=128):
        name = line.strip()
        if name and not _NAME.fullmatch(name):
            raise damaged_file(path, f"has no name of an image in line {number}")
        names += [name] if name else []
    return names


def _sample(folder: Path, name: str) -> Sample:
    labels = [folder / "SegmentationClass" / f"{name}.png"]
    if (folder / "SegmentationObject").is_dir():
        labels.append(folder / "SegmentationObject" / f"{name}.png")
        if (folder / "Annotations").is_dir():
            labels.append(folder / "Annotations" / f"{name}.xml")
    return Sample(folder / "JPEGImages" / f"{name}.jpg", tuple(labels))


def read_voc(sample: Sample, height: int, width: int) -> Instances:
    """Return the instances of an image; those that its annotation calls difficult are crowd.

    Raises:
        DataError: a file is missing or damaged, or two files contradict each other.
    """
    classes = read_labels(sample.labels[0])
    _require_classes(sample.labels[0], classes)
    if len(sample.labels) == 1:
        labels = {number: number for number in range(1, len(CLASSES) + 1)}
        return connected_regions(fit_labels(classes, height, width), labels)
    objects = read_labels(sample.labels[1])
    if objects.shape != classes.shape:
        raise damaged_file(sample.labels[1], f"has another size than {sample.labels[0].name} of the classes")
    numbers = np.where(objects == _BORDER, 0, objects).astype(np.uint8)
    count = int(numbers.max())
    if count > MAX_INSTANCES:
        raise damaged_file(sample.labels[1], f"has {count} instances, and {MAX_INSTANCES} are the most")
    own = tuple(_class_of(classes[numbers == k]) for k in range(1, count + 1))
    crowd = (False,) * count
    if len(sample.labels) > 2:
        crowd = _difficult(sample.labels[2], own)
    return Instances(fit_labels(numbers, height, width), own, crowd)


def _require_classes(path: Path, classes: NDArray[np.uint8]) -> None:
    numbers = classes[classes != _BORDER]
    if numbers.size and numbers.max() > len(CLASSES):
        raise damaged_file(path, f"has the class {numbers.max()}, and {len(CLASSES)} is the largest")


def _class_of(pixels: NDArray[np.uint8]) -> int:
    """Return the most frequent class of an instance's pixels; 1 for an instance without pixels."""
    inside = pixels[(pixels != _BORDER) & (pixels != 0)]
    return int(np.bincount(inside).argmax()) if inside.size else 1


def _difficult(path: Path, labels: tuple[int, ...]) -> tuple[bool, ...]:
    """Return whether each instance is difficult.

    Args:
        path: the XML annotation.
        labels: class of each instance.

    Raises:
        DataError: the annotation is damaged, or has fewer objects or other classes than the label images.
    """
    text = read_text(path, _MAX_XML)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise damaged_file(path, "declares entities")
    try:
        objects = ElementTree.fromstring(text).findall("object")
    except ElementTree.ParseError:
        raise damaged_file(path, "is no XML") from None
    if len(objects) < len(labels):
        raise damaged_file(path, f"has {len(objects)} objects, and the label image {len(labels)}")
    for number, (entry, label) in enumerate(zip(objects, labels, strict=False), start=1):
        if (entry.findtext("name") or "").strip() != CLASSES[label - 1]:
            raise damaged_file(path, f"names another class for object {number} than the label image")
    return tuple((entry.findtext("difficult") or "0").strip() == "1" for entry in objects[: len(labels)])
