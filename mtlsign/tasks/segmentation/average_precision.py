"""Average precision of instances as COCO defines it, computed by pycocotools."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from mtlsign.errors import DataError

#: Probability from which a pixel belongs to a mask.
_MASK_THRESHOLD = 0.5
#: Positions of the mean over overlaps .50 to .95, and of .50 alone, in pycocotools' statistics.
_MEAN, _AT_50 = 0, 1


def require_pycocotools() -> None:
    """Raise `DataError` if pycocotools is not installed."""
    if importlib.util.find_spec("pycocotools") is None:
        raise DataError(
            "Tasks of instances need pycocotools. Install it with `pip install 'mtlsign[detection]'`.",
            field="task",
        )


class InstanceMetric:
    """Mean average precision of masks, or of boxes if the targets have no masks.

    Detections and targets are kept as compressed masks. `value` and `scores` gather those of all ranks, so
    that every rank must call them.

    Args:
        device: device of the state.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        #: Number of images: float64 [1].
        self.state = torch.zeros(1, dtype=torch.float64, device=device)
        self._images: list[dict[str, Any]] = []

    def update(self, outputs: Any, targets: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the detections of some images; outputs of a training pass, which have none, are left out."""
        if isinstance(outputs, Mapping):
            return
        for detected, target in zip(outputs, targets, strict=True):
            self._images.append(_compressed(detected, target))
        self.state += len(targets)

    def value(self) -> float:
        """Return the mean average precision over overlaps from .50 to .95; 0 without images."""
        scores = self.scores()
        return scores.get("mask_map", scores.get("box_map", 0.0))

    def scores(self) -> dict[str, float]:
        """Return `box_map` and `box_map50`, and the same of masks if the targets have any."""
        images = self._gathered()
        if not images:
            return {}
        kinds = {"box": "bbox", "mask": "segm"} if "masks" in images[0] else {"box": "bbox"}
        scores: dict[str, float] = {}
        for name, kind in kinds.items():
            statistics = _coco_statistics(images, kind)
            scores |= {f"{name}_map": statistics[_MEAN], f"{name}_map50": statistics[_AT_50]}
        return scores

    def drawn(self, rows: Sequence[int]) -> InstanceMetric:
        """Return the metric of some of this rank's images, which may repeat."""
        other = InstanceMetric(self.state.device)
        other._images = [self._images[row] for row in rows]
        other.state += len(rows)
        return other

    def _gathered(self) -> list[dict[str, Any]]:
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return self._images
        parts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, self._images)
        return [image for part in parts for image in part]


def _compressed(detected: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return targets and detections of one image as plain numbers and run-length codes."""
    image: dict[str, Any] = {
        "boxes": _boxes(target["boxes"]),
        "labels": target["labels"].tolist(),
        "crowd": target.get("iscrowd", torch.zeros(len(target["labels"]))).int().tolist(),
        "found_boxes": _boxes(detected["boxes"]),
        "found_labels": detected["labels"].tolist(),
        "scores": detected["scores"].tolist(),
    }
    if "masks" in target and "masks" in detected:
        image["height"], image["width"] = target["masks"].shape[1:]
        image["masks"] = _run_lengths(target["masks"])
        image["found_masks"] = _run_lengths(detected["masks"].flatten(0, 1) > _MASK_THRESHOLD)
    return image


def _boxes(boxes: Tensor) -> list[list[float]]:
    """Return boxes as left, top, width, height."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double().tolist()


def _run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """Return the codes of masks [k, H, W]."""
    from pycocotools import mask as codec

    plain = masks.to("cpu", torch.uint8).numpy()
    return [codec.encode(np.asfortranarray(mask)) for mask in plain]


def _coco_statistics(images: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    """Return pycocotools' statistics; -1, for a class that no image has, becomes 0."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    guesses: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        for index, box in enumerate(image["boxes"]):
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "bbox": box, "area": box[2] * box[3],
                "category_id": image["labels"][index], "iscrowd": image["crowd"][index],
                **({"segmentation": image["masks"][index]} if kind == "segm" else {}),
            })  # fmt: skip
        for index, box in enumerate(image["found_boxes"]):
            guesses.append({
                "id": len(guesses) + 1, "image_id": number, "bbox": box, "area": box[2] * box[3],
                "category_id": image["found_labels"][index], "iscrowd": 0, "score": image["scores"][index],
                **({"segmentation": image["found_masks"][index]} if kind == "segm" else {}),
            })  # fmt: skip
    if not annotations or not guesses:
        return [0.0] * 12
    classes = sorted({entry["category_id"] for entry in annotations})
    with contextlib.redirect_stdout(io.StringIO()):
        truth, results = COCO(), COCO()
        for data, entries in ((truth, annotations), (results, guesses)):
            data.dataset = {
                "images": [
                    {"id": number, "height": image.get("height"), "width": image.get("width")}
                    for number, image in enumerate(images, start=1)
                ],
                "categories": [{"id": label} for label in classes],
                "annotations": entries,
            }
            data.createIndex()
        evaluation = COCOeval(truth, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [max(0.0, float(statistic)) for statistic in evaluation.stats]
