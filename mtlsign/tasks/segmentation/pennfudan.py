"""Penn-Fudan pedestrians: `PNGImages/NAME.png` and `PedMasks/NAME_mask.png` below `PennFudanPed`.

The grey values of a mask are the numbers of the instances. There are no official parts; three tenths of the
images, the same for every seed, are the test part.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mtlsign.tasks.segmentation.image_files import fit_labels, listed_files, read_labels
from mtlsign.tasks.segmentation.instances import MAX_INSTANCES, Instances
from mtlsign.tasks.segmentation.sources import Sample
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.tasks.text.text_files import damaged_file

FOLDER = "PennFudanPed"
_TEST = 0.3
_MAX_IMAGES = 10_000


def pennfudan_samples(root: Path) -> dict[str, list[Sample]]:
    """Return the samples of the parts train and test. Raises `DataError` if a folder is missing."""
    folder = root / FOLDER
    samples = [
        Sample(path, (folder / "PedMasks" / f"{path.stem}_mask.png",))
        for path in listed_files(folder / "PNGImages", (".png",), _MAX_IMAGES)
    ]
    order = torch.randperm(len(samples), generator=seeded_generator("mtlsign/pennfudan/test"))
    test = set(order[: round(_TEST * len(samples))].tolist())
    return {
        "train": [sample for row, sample in enumerate(samples) if row not in test],
        "test": [sample for row, sample in enumerate(samples) if row in test],
    }


def read_pennfudan(sample: Sample, height: int, width: int) -> Instances:
    """Return the pedestrians of an image. Raises `DataError` for a damaged mask."""
    numbers = read_labels(sample.labels[0])
    count = int(numbers.max())
    if count > MAX_INSTANCES:
        raise damaged_file(sample.labels[0], f"has {count} instances, and {MAX_INSTANCES} are the most")
    return Instances(fit_labels(numbers, height, width), (1,) * count, (False,) * count)
