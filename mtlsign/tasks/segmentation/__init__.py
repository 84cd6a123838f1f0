"""Tasks of instances: `camvid`, `pennfudan` and `voc`, with boxes, classes and masks of objects.

`"camvid@0.2"` is a fifth of each part. The images are in memory, scaled to fit into a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtlsign.errors import DataError
from mtlsign.models.input_spec import ImageSpec
from mtlsign.tasks.base import Task
from mtlsign.tasks.segmentation.camvid import LABELS, camvid_samples, read_camvid
from mtlsign.tasks.segmentation.detection import detection_fields
from mtlsign.tasks.segmentation.image_files import read_photograph, require_equal_sizes
from mtlsign.tasks.segmentation.instances import Instances, InstanceSplit
from mtlsign.tasks.segmentation.pennfudan import pennfudan_samples, read_pennfudan
from mtlsign.tasks.segmentation.sources import Sample
from mtlsign.tasks.segmentation.voc import CLASSES, read_voc, voc_samples
from mtlsign.tasks.splitting import share_of_rows, split_training_rows

__all__ = ["NAMES", "load_segmentation"]


@dataclass(frozen=True)
class _Source:
    """Data set of instances.

    Attributes:
        samples: (data root) -> samples by part: train, test and possibly val.
        read: (sample, height, width) -> instances in the frame.
        classes: number of classes without the background.
        frame: height and width in pixels.
    """

    samples: Callable[[Path], dict[str, list[Sample]]]
    read: Callable[[Sample, int, int], Instances]
    classes: int
    frame: tuple[int, int]


_SOURCES = {
    "camvid": _Source(camvid_samples, read_camvid, len(LABELS), (180, 240)),
    "pennfudan": _Source(pennfudan_samples, read_pennfudan, 1, (256, 256)),
    "voc": _Source(voc_samples, read_voc, len(CLASSES), (256, 256)),
}
NAMES = tuple(_SOURCES)


def load_segmentation(
    name: str, root: Path, *, seed: int, share: float = 1.0, frame: tuple[int, int] | None = None
) -> Task:
    """Load a task of `NAMES`; its test split is the data set's test part.

    Args:
        name: name of the data set.
        root: data root with the unpacked official archive.
        seed: division of the training part.
        share: part of the images to keep, 0 to 1: the same images for every seed.
        frame: height and width in pixels to which images are scaled; by default those of the data set.

    Raises:
        DataError: files are missing, damaged or too few, or pycocotools is not installed.
    """
    source = _SOURCES[name]
    fields = detection_fields()
    parts = source.samples(root)
    if share < 1:
        parts = {part: _part_of(f"{name}/{part}", samples, share) for part, samples in parts.items()}
    size = frame or source.frame
    loaded = {part: _read(name, samples, source, size) for part, samples in parts.items()}
    splits = {}
    present = frozenset({"validation"} if "val" in loaded else ())
    images, instances = loaded["train"]
    for split, rows in split_training_rows(len(images), seed, present).items():
        splits[split] = InstanceSplit(images, instances, rows)
    for part, split in (("test", "test"), ("val", "validation")):
        if part in loaded:
            splits[split] = InstanceSplit(*loaded[part], torch.arange(len(loaded[part][0])))
    spec = ImageSpec(3, *size, source.classes, outputs="instances")
    return Task(name if share == 1 else f"{name}@{share:g}", spec, splits, **fields)


def _part_of(name: str, samples: Sequence[Sample], share: float) -> list[Sample]:
    rows = share_of_rows(name, torch.zeros(len(samples), dtype=torch.int64), share)
    return [samples[row] for row in rows.sort().values.tolist()]


def _read(
    name: str, samples: Sequence[Sample], source: _Source, frame: tuple[int, int]
) -> tuple[Tensor, list[Instances]]:
    """Return images uint8 [n, 3, H, W] and instances of one part."""
    if not samples:
        raise DataError(f"A part of {name} has no images. Unpack the official archive.", field="data")
    images, instances = np.zeros((len(samples), 3, *frame), np.uint8), []
    for row, sample in enumerate(samples):
        images[row] = read_photograph(sample.image, *frame)
        require_equal_sizes(sample.labels[0], sample.image)
        instances.append(source.read(sample, *frame).without_small())
    return torch.from_numpy(images), instances
