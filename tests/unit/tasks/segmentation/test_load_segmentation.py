"""Tests of the readers on generated folders of the official layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mtlsign.errors import DataError
from mtlsign.tasks import SPLITS, load_task
from mtlsign.tasks.segmentation import load_segmentation
from tests.unit.tasks.segmentation.layouts import (
    HEIGHT,
    WIDTH,
    label_image,
    write_annotation,
    write_camvid,
    write_pennfudan,
    write_voc,
)

FRAME = (HEIGHT, WIDTH)
#: Left, top, right and bottom of the objects; the first row of the first one is a border in VOC.
BOXES = [[6.0, 4.0, 26.0, 20.0], [36.0, 24.0, 60.0, 44.0]]
WRITERS: dict[str, Callable[[Path], None]] = {
    "camvid": write_camvid,
    "pennfudan": write_pennfudan,
    "voc": write_voc,
}
VOC = Path("VOCdevkit/VOC2012")


@pytest.mark.parametrize(("name", "labels"), [("camvid", [1, 2]), ("pennfudan", [1, 1]), ("voc", [1, 15])])
def test_load_segmentation_reads_the_official_layout(name: str, labels: list[int], tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    task = load_segmentation(name, tmp_path, seed=1, frame=FRAME)
    assert set(task.splits) == set(SPLITS)
    assert task.input_spec.outputs == "instances"
    batch = task.splits["test"].batch(torch.arange(2))
    assert batch.inputs.shape == (2, 3, *FRAME)
    for target in batch.targets:
        order = target["labels"].argsort(stable=True)
        expected = torch.tensor(BOXES)
        if name == "voc":
            expected[0, 1] += 1
        torch.testing.assert_close(target["boxes"][order], expected)
        assert target["labels"][order].tolist() == labels
        assert target["masks"].shape == (2, *FRAME)
        assert target["iscrowd"].tolist() == ([False, True] if name == "voc" else [False, False])


def test_load_segmentation_has_equal_batches_for_equal_seeds_and_no_overlap(tmp_path: Path) -> None:
    write_camvid(tmp_path, (20, 2, 2))
    first, second = (load_segmentation("camvid", tmp_path, seed=3, frame=FRAME) for _ in range(2))
    rows = [set(first.splits[name].rows.tolist()) for name in ("train", "attacker")]  # type: ignore[attr-defined]
    assert not rows[0] & rows[1]
    batches = [task.batch_at("train", 4, 7, seed=3, augment=True) for task in (first, second)]
    torch.testing.assert_close(batches[0].inputs, batches[1].inputs)
    torch.testing.assert_close(batches[0].targets, batches[1].targets)
    half = first.batch_at("train", 4, 7, seed=3, augment=True, rank=1, world=2)
    torch.testing.assert_close(half.inputs, batches[0].inputs[2:])


def test_load_task_reads_a_share_and_scaled_folders(tmp_path: Path) -> None:
    write_camvid(tmp_path, (22, 11, 11), folder="CamVid-64x48")
    task = load_task("camvid@0.5", data=tmp_path)
    assert (task.name, task.size("validation"), task.size("test")) == ("camvid@0.5", 10, 10)
    assert task.splits["test"].batch(torch.arange(1)).inputs.shape[1:] == (3, 180, 240)


def test_load_segmentation_without_objects_takes_connected_regions(tmp_path: Path) -> None:
    write_voc(tmp_path, objects=False)
    task = load_segmentation("voc", tmp_path, seed=1, frame=FRAME)
    labels = [target["labels"].tolist() for target in task.splits["test"].batch(torch.arange(3)).targets]
    assert [sorted(own) for own in labels] == [[1, 15]] * 3


def _two_objects_for_one(root: Path) -> None:
    write_annotation(root / VOC / "Annotations/2007_000000.xml", ("aeroplane",))


def _other_class(root: Path) -> None:
    write_annotation(root / VOC / "Annotations/2007_000000.xml", ("boat", "person"))


def _entities(root: Path) -> None:
    (root / VOC / "Annotations/2007_000000.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>')


def _large_class(root: Path) -> None:
    label_image(root / VOC / "SegmentationClass/2007_000000.png", (21, 15), palette=True)


def _path_as_name(root: Path) -> None:
    (root / VOC / "ImageSets/Segmentation/train.txt").write_text("../../etc/passwd\n")


def _truncated_photograph(root: Path) -> None:
    path = root / VOC / "JPEGImages/2007_000000.jpg"
    path.write_bytes(path.read_bytes()[:200])


def _colours(root: Path) -> None:
    photo = (root / VOC / "JPEGImages/2007_000000.jpg").read_bytes()
    (root / VOC / "SegmentationObject/2007_000000.png").write_bytes(photo)


def _missing_labels(root: Path) -> None:
    (root / VOC / "SegmentationClass/2007_000000.png").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_two_objects_for_one, "has 1 objects"),
        (_other_class, "names another class for object 1"),
        (_entities, "declares entities"),
        (_large_class, "has the class 21"),
        (_path_as_name, "has no name of an image in line 1"),
        (_truncated_photograph, "is damaged|is no JPEG"),
        (_colours, "has colours"),
        (_missing_labels, "is no file"),
    ],
)
def test_load_segmentation_refuses_damaged_files(
    damage: Callable[[Path], None], problem: str, tmp_path: Path
) -> None:
    write_voc(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=problem) as error:
        load_segmentation("voc", tmp_path, seed=1, frame=FRAME)
    assert error.value.field == "data"


def test_load_segmentation_refuses_empty_and_missing_folders(tmp_path: Path) -> None:
    for name in WRITERS:
        with pytest.raises(DataError, match=r"missing|no folder"):
            load_segmentation(name, tmp_path, seed=1)
    for part in ("train", "val", "test"):
        (tmp_path / "CamVid" / part).mkdir(parents=True)
    with pytest.raises(DataError, match="has no images"):
        load_segmentation("camvid", tmp_path, seed=1)
