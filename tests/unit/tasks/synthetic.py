"""Synthetic tasks and data sets for the task tests."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from mtlsign.tasks import Batch, InputTransform, Task, from_tensors
from mtlsign.tasks.splitting import seeded_generator


def images(count: int = 100, side: int = 6, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = seeded_generator("test", seed)
    x = torch.randint(256, (count, 1, side, side), generator=gen, dtype=torch.uint8)
    return x, torch.arange(count) % classes


def task(**options: Any) -> Task:
    transform = InputTransform((0.5,), (0.5,), pad=2, flip=True)
    return from_tensors(*images(), transform=transform, **options)


def joined(batches: Iterable[Batch]) -> Batch:
    batches = list(batches)
    return Batch(torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches]))


class Pixels(Dataset[tuple[Tensor, int]]):
    """A map-style dataset with random transforms from all three global generators."""

    def __init__(self, count: int = 60) -> None:
        self.count = count
        self.targets = [i % 3 for i in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(1) + random.random() + np.random.rand()
        return torch.full((2, 5, 4), float(index)) + noise, self.targets[index]


class Stream(IterableDataset[tuple[Tensor, int]]):
    """A dataset that can only be read from its beginning."""

    def __iter__(self) -> Any:
        return iter([(torch.full((2, 5, 4), float(i)), i % 3) for i in range(30)])
