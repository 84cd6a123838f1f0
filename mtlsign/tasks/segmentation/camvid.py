"""CamVid in the layout of SegNet: `train`, `val`, `test`, and their label images in `trainannot` and so on.

The label images have one of eleven classes for each pixel and no instances. An instance is therefore a
connected region of a class; objects that touch become one.
"""

from __future__ import annotations

from pathlib import Path

from mtlsign.tasks.segmentation.image_files import fit_labels, listed_files, read_labels
from mtlsign.tasks.segmentation.instances import Instances, connected_regions
from mtlsign.tasks.segmentation.sources import Sample
from mtlsign.tasks.text.text_files import damaged_file

#: Class of a label image -> label of the task: car, pedestrian, cyclist.
LABELS = {8: 1, 9: 2, 10: 3}
#: Numbers of the eleven classes, and 11 for pixels without one.
_LARGEST = 11
_MAX_IMAGES = 10_000


def camvid_samples(root: Path) -> dict[str, list[Sample]]:
    """Return the samples of the three official parts.

    Args:
        root: data root with a folder `CamVid`, or one such as `CamVid-240x180` of scaled images.

    Raises:
        DataError: a folder is missing or has too many images.
    """
    folder = root / "CamVid"
    scaled = sorted(root.glob("CamVid-*")) if root.is_dir() else []
    if not folder.is_dir() and scaled:
        folder = scaled[0]
    parts = {}
    for part in ("train", "val", "test"):
        labels = folder / f"{part}annot"
        parts[part] = [
            Sample(path, (labels / f"{path.stem}.png",))
            for path in listed_files(folder / part, (".png", ".jpg"), _MAX_IMAGES)
        ]
    return parts


def read_camvid(sample: Sample, height: int, width: int) -> Instances:
    """Return the connected regions of cars, pedestrians and cyclists. Raises `DataError` for damage."""
    labels = read_labels(sample.labels[0])
    if labels.max() > _LARGEST:
        raise damaged_file(sample.labels[0], f"has the class {labels.max()}, and {_LARGEST} is the largest")
    return connected_regions(fit_labels(labels, height, width), LABELS)
