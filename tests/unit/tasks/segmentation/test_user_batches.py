from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mtlsign.errors import DataError
from mtlsign.tasks import from_loaders
from mtlsign.tasks.segmentation.user_batches import detection_targets, padded_images
from tests.unit.models.detector_examples import SIDE, Objects, objects


def test_from_loaders_of_detection_data_is_a_task_of_instances() -> None:
    loader = DataLoader(
        Objects(12), batch_size=2, collate_fn=lambda samples: tuple(zip(*samples, strict=True))
    )
    task = from_loaders({"train": loader, "test": Objects(3, 100)})
    assert (task.input_spec.outputs, task.classes) == ("instances", 2)
    batch = task.splits["test"].batch(torch.arange(2))
    assert batch.inputs.shape == (2, 3, SIDE, SIDE)
    torch.testing.assert_close(batch.targets[1]["boxes"], objects(101)[1]["boxes"])


def test_from_loaders_of_detection_data_refuses_a_loss() -> None:
    with pytest.raises(DataError, match="Leave out loss, metric and logits_of"):
        from_loaders({"train": Objects(12), "test": Objects(3)}, loss=lambda out, y: out)


def test_from_loaders_of_copied_detection_batches_names_the_fix() -> None:
    image, target = objects(0)
    batches: list[Any] = [([image], [target])] * 3
    with pytest.raises(DataError, match="Give their dataset or a DataLoader"):
        from_loaders({"train": batches, "test": batches})


def test_padded_images_and_targets_have_the_largest_size() -> None:
    small = torch.full((3, 2, 5), 255, dtype=torch.uint8)
    images = padded_images([small, torch.rand(3, 4, 3)])
    assert images.shape == (2, 3, 4, 5) and float(images[0].sum()) == 30
    targets = detection_targets(
        [
            {"boxes": torch.zeros(1, 4), "labels": torch.ones(1), "masks": torch.ones(1, 2, 5)},
            {"boxes": torch.zeros(2, 4), "labels": torch.ones(2), "masks": torch.ones(2, 4, 3)},
        ]
    )
    assert [list(target["masks"].shape) for target in targets] == [[1, 4, 5], [2, 4, 5]]
    assert targets[0]["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ({"boxes": torch.zeros(1, 4)}, "has no labels"),
        ({"boxes": torch.zeros(2, 4), "labels": torch.ones(1)}, "'boxes' of a target does not fit"),
        ({"boxes": torch.zeros(1, 5), "labels": torch.ones(1)}, "must have four numbers"),
    ],
)
def test_detection_targets_refuses_incomplete_ones(target: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        detection_targets([target])


def test_padded_images_refuses_other_inputs() -> None:
    with pytest.raises(DataError, match="must be tensors"):
        padded_images(["a.jpg"])
    with pytest.raises(DataError, match="several numbers of channels"):
        padded_images([torch.zeros(3, 2, 2), torch.zeros(1, 2, 2)])
