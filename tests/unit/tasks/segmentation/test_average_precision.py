from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtlsign.errors import DataError
from mtlsign.tasks.segmentation.average_precision import InstanceMetric, require_pycocotools

SIDE = 40


def target(*boxes: tuple[int, int, int, int], crowd: tuple[bool, ...] | None = None) -> dict[str, Tensor]:
    """Return a target of class 1 whose masks fill their boxes."""
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.ones(len(boxes), dtype=torch.int64),
        "masks": masks,
        "iscrowd": torch.tensor(crowd or (False,) * len(boxes)),
    }


def detection(truth: dict[str, Tensor], scores: tuple[float, ...]) -> dict[str, Tensor]:
    """Return a target as detections with these scores."""
    masks = truth["masks"][:, None].float()
    return {
        "boxes": truth["boxes"],
        "labels": truth["labels"],
        "masks": masks,
        "scores": torch.tensor(scores),
    }


def test_instance_metric_of_right_detections_is_one() -> None:
    metric, truth = InstanceMetric(), target((2, 2, 20, 20), (22, 20, 38, 36))
    metric.update([detection(truth, (0.9, 0.8))], [truth])
    scores = metric.scores()
    assert scores == pytest.approx({name: 1.0 for name in scores})
    assert set(scores) == {"box_map", "box_map50", "mask_map", "mask_map50"}
    assert metric.value() == pytest.approx(1.0) and metric.state.tolist() == [1.0]


def test_instance_metric_counts_overlap_and_missing_objects() -> None:
    # An overlap of .8 is right for seven of the ten thresholds; the other object is missing.
    truth, shifted = target((0, 0, 20, 20), (22, 20, 38, 36)), target((0, 0, 16, 20))
    metric = InstanceMetric()
    metric.update([detection(shifted, (0.9,))], [truth])
    half = 51 / 101  # of the 101 recalls, those up to one half
    assert metric.scores()["mask_map50"] == pytest.approx(half)
    assert metric.value() == pytest.approx(0.7 * half)


def test_instance_metric_ignores_crowd() -> None:
    truth = target((2, 2, 20, 20), (22, 20, 38, 36), crowd=(False, True))
    metric = InstanceMetric()
    metric.update([detection(truth, (0.1, 0.9))], [truth])
    assert metric.value() == pytest.approx(1.0)


def test_instance_metric_without_masks_or_detections() -> None:
    truth = target((2, 2, 20, 20))
    boxes = {name: truth[name] for name in ("boxes", "labels")}
    metric = InstanceMetric()
    assert metric.value() == 0.0
    metric.update([{**boxes, "scores": torch.tensor([0.5])}], [boxes])
    assert metric.scores() == {"box_map": pytest.approx(1.0), "box_map50": pytest.approx(1.0)}
    nothing = InstanceMetric()
    nothing.update([detection(target(), ())], [truth])
    assert nothing.value() == 0.0


def test_instance_metric_drawn_has_the_chosen_images_alone() -> None:
    truth = target((2, 2, 20, 20))
    metric = InstanceMetric()
    metric.update([detection(truth, (0.9,)), detection(target(), ())], [truth, truth])
    assert metric.drawn([0, 0, 0]).value() == pytest.approx(1.0)
    assert metric.drawn([1]).value() == 0.0 and metric.drawn([0, 1]).state.tolist() == [2.0]


def test_instance_metric_leaves_out_training_outputs() -> None:
    metric = InstanceMetric()
    metric.update({"losses": {}, "features": []}, [target((2, 2, 20, 20))])
    assert metric.state.tolist() == [0.0]


def test_require_pycocotools_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"mtlsign\[detection\]"):
        require_pycocotools()


#: Program of one rank: it updates the metric with one image of two, and prints the scores.
RANK = """
import sys
from torch import distributed
from tests.unit.tasks.segmentation.test_average_precision import examples
from mtlsign.tasks.segmentation.average_precision import InstanceMetric

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
metric = InstanceMetric()
detected, truth = examples()[rank]
metric.update([detected], [truth])
print(sorted(metric.scores().items()), metric.value())
distributed.destroy_process_group()
"""


def examples() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Return detections and targets of two images: a right one, and one that misses an object."""
    first, second = target((2, 2, 20, 20)), target((4, 4, 30, 30), (32, 2, 39, 12))
    return [(detection(first, (0.6,)), first), (detection(target((4, 4, 28, 30)), (0.8,)), second)]


def test_instance_metric_gathers_the_images_of_all_ranks(tmp_path: Path) -> None:
    metric = InstanceMetric()
    for detected, truth in examples():
        metric.update([detected], [truth])
    expected = f"{sorted(metric.scores().items())} {metric.value()}"
    assert 0 < metric.value() < 1
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4],
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == [expected, expected]
