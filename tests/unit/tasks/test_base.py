from __future__ import annotations

import pytest
import torch

from mtlsign.errors import DataError
from mtlsign.models.input_spec import ImageSpec
from tests.unit.tasks.synthetic import joined, task


@pytest.mark.parametrize("world", [2, 3, 4])
def test_batch_at_of_ranks_join_to_global_batch(world: int) -> None:
    t = task()
    for step in (0, 7, 1000):
        x, y = t.batch_at("train", 20, step, seed=5, augment=True)
        parts = [
            t.batch_at("train", 20, step, seed=5, rank=r, world=world, augment=True) for r in range(world)
        ]
        assert torch.equal(joined(parts).inputs, x) and torch.equal(joined(parts).targets, y)


def test_batches_of_epoch_are_those_of_batch_at_and_cover_split() -> None:
    t = task()
    assert t.size("train") == 68 and t.steps("train", 20) == 3
    epoch = list(t.batches("train", 20, epoch=2, seed=1, augment=True))
    assert len(epoch) == 3
    for position, (x, y) in enumerate(epoch):
        second = t.batch_at("train", 20, 2 * 3 + position, seed=1, augment=True)
        assert torch.equal(x, second.inputs) and torch.equal(y, second.targets)
    orders = [joined(list(t.batches("train", 17, epoch=e, seed=1))).inputs for e in (0, 1)]
    assert not torch.equal(*orders)
    assert torch.equal(*(order.flatten(1).sum(1).sort().values for order in orders))
    other = t.batch_at("train", 20, 0, seed=2)
    assert not torch.equal(other.inputs, t.batch_at("train", 20, 0, seed=1).inputs)


def test_batch_at_leaves_global_generator_unchanged() -> None:
    t = task()
    state = torch.get_rng_state()
    t.batch_at("train", 20, 0, augment=True)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_in_order_drop_no_sample(world: int) -> None:
    t = task()
    every = [list(t.batches("test", 7, shuffle=False, rank=r, world=world)) for r in range(world)]
    assert sum(len(y) for part in every for _, y in part) == t.size("test") == 20
    if world == 1:
        assert torch.equal(joined(every[0]).targets, t.splits["test"].batch(torch.arange(20)).targets)


def test_batch_at_of_small_split_returns_whole_split() -> None:
    t = task()
    assert t.steps("inner", 1000) == 1
    assert len(t.batch_at("inner", 1000, 5).targets) == t.size("inner") == 7


def test_batch_at_with_more_ranks_than_samples_raises_data_error() -> None:
    t = task()
    with pytest.raises(DataError, match="larger batch"):
        t.batch_at("train", 2, 0, rank=0, world=3)
    with pytest.raises(DataError, match="is no split"):
        t.size("valid")


def test_input_spec_describes_images_and_classes() -> None:
    assert task().input_spec == ImageSpec(1, 6, 6, 5)
