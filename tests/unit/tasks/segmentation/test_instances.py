from __future__ import annotations

import numpy as np
import torch

from mtlsign.tasks.segmentation.instances import (
    Instances,
    InstanceSplit,
    connected_regions,
    instance_targets,
)


def test_connected_regions_joins_diagonals_and_leaves_out_small_ones() -> None:
    classes = np.zeros((40, 40), np.uint8)
    classes[0:10, 0:10] = 8
    classes[10:20, 10:20] = 8  # touches the first at a corner
    classes[30:40, 0:10] = 8
    classes[30:35, 30:35] = 9
    regions = connected_regions(classes, {8: 1, 9: 2})
    assert regions.labels == (1, 1)
    assert [int((regions.numbers == k).sum()) for k in (1, 2)] == [200, 100]


def test_without_small_numbers_the_rest_again() -> None:
    numbers = np.zeros((30, 40), np.uint8)
    numbers[0:2, 0:30] = 1  # too low
    numbers[5:20, 5:20] = 3  # 2 has no pixels
    rest = Instances(numbers, (7, 8, 9), (False, False, True)).without_small()
    assert (rest.labels, rest.crowd) == ((9,), (True,))
    assert int((rest.numbers == 1).sum()) == 225


def test_instance_targets_flip_mirrors_boxes_and_masks() -> None:
    numbers = np.zeros((20, 30), np.uint8)
    numbers[2:12, 5:15] = 1
    target = instance_targets(Instances(numbers, (4,), (False,)), flip=True)
    assert target["boxes"].tolist() == [[15.0, 2.0, 25.0, 12.0]]
    assert bool(target["masks"][0, 2:12, 15:25].all()) and int(target["masks"].sum()) == 100


def test_instance_split_without_objects_has_empty_targets() -> None:
    empty = Instances(np.zeros((20, 30), np.uint8), (), ())
    split = InstanceSplit(torch.zeros(1, 3, 20, 30, dtype=torch.uint8), [empty], torch.arange(1))
    (target,) = split.batch(torch.arange(1)).targets
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 20, 30)
