"""The attacker's data: his tenth of the training part, more of it if his budget says so, seen as he sees
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from mtlsign.attacks.base import AttackerResources, Inputs, device_of
from mtlsign.tasks import Batch, Split, Task
from mtlsign.tasks.base import seeded_generator


@dataclass(frozen=True)
class ConcatSplit:
    """Rows of several splits as one."""

    parts: Sequence[tuple[Split, Tensor]]

    def __len__(self) -> int:
        """Number of samples."""
        return sum(len(rows) for _, rows in self.parts)

    def to(self, device: torch.device | str) -> ConcatSplit:
        """The same on `device`."""
        return ConcatSplit([(split.to(device), rows) for split, rows in self.parts])

    def batch(self, indices: Tensor, augment: Generator | None = None, share: slice | None = None) -> Batch:
        """See `Split.batch`."""
        xs, ys, places, start = [], [], [], 0
        for split, rows in self.parts:
            here = torch.nonzero((indices >= start) & (indices < start + len(rows))).flatten()
            if len(here):
                x, y = split.batch(rows[indices[here] - start], augment)
                xs.append(x)
                ys.append(y)
                places.append(here)
            start += len(rows)
        order = torch.argsort(torch.cat(places)).to(xs[0].device)
        part = share or slice(0, len(indices))
        return torch.cat(xs)[order][part], torch.cat(ys)[order][part]


@dataclass(frozen=True)
class TransformedSplit:
    """A split whose images are changed on the way to the model."""

    split: Split
    inputs: Inputs

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.split)

    def to(self, device: torch.device | str) -> TransformedSplit:
        """The same on `device`."""
        return TransformedSplit(self.split.to(device), self.inputs)

    def batch(self, indices: Tensor, augment: Generator | None = None, share: slice | None = None) -> Batch:
        """See `Split.batch`."""
        x, y = self.split.batch(indices, augment, share)
        return transform_inputs(x, self.inputs), y


def transform_inputs(x: Tensor, inputs: Inputs) -> Tensor:
    """Images [n, C, H, W] as an attacked model wants them."""
    for step in inputs:
        x = x.transpose(2, 3) if step == "transposed" else -x
    return x


def transform_task(task: Task, inputs: Inputs) -> Task:
    """The task with every image changed."""
    if not inputs:
        return task
    height, width = task.height, task.width
    if inputs.count("transposed") % 2:
        height, width = width, height
    splits = {name: TransformedSplit(split, inputs) for name, split in task.splits.items()}
    return replace(task, splits=splits, height=height, width=width)


def attacker_view(model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> Task:
    """The task on the model's device as the attacker has it: every split but test holds his data alone.

    So nothing that reuses the owner's machinery can touch the owner's data, or choose by the test part.
    """
    mine: Split = task.splits["attacker"]
    if budget.extra > 0:
        train = task.splits["train"]
        count = min(len(train), round(budget.extra * len(train)))
        rows = torch.randperm(len(train), generator=seeded_generator("mtlsign/attack/extra", seed))[:count]
        mine = ConcatSplit([(mine, torch.arange(len(mine))), (train, rows)])
    few = ConcatSplit([(mine, torch.arange(min(500, len(mine))))])
    parts: dict[str, Split] = {"train": mine, "inner": mine, "attacker": mine, "validation": few, "test": few}
    return replace(task, splits=parts).to(device_of(model))
