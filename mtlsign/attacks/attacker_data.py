"""Data of the attacker: a tenth of the training part, optionally more, as the attacked model sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mtlsign.attacks.base import (
    AttackerResources,
    ChannelMix,
    InputTransforms,
    NotApplicableError,
    Preprocessing,
    TokenRenumbering,
    Turn,
    device_of,
)
from mtlsign.models.input_spec import ImageSpec, TextSpec
from mtlsign.tasks import Batch, Split, Task
from mtlsign.tasks.splitting import seeded_generator

#: Size of the attacker's validation and test splits.
SMALL_SPLIT = 500

#: Symmetries of the square, for images [n, C, H, W] and kernels [O, I, H, W].
TURNS: Mapping[Turn, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(2, 3),
    "flipped_rows": lambda x: x.flip(2),
    "flipped_columns": lambda x: x.flip(3),
    "rotated": lambda x: torch.rot90(x, 1, (2, 3)),
}


@dataclass(frozen=True)
class ConcatSplit:
    """Rows of several splits as one split.

    Attributes:
        parts: (split, rows int64) in order.
    """

    parts: Sequence[tuple[Split, Tensor]]

    def __len__(self) -> int:
        """Number of samples."""
        return sum(len(rows) for _, rows in self.parts)

    def to(self, device: torch.device | str) -> ConcatSplit:
        """Return the same split with batches on `device`."""
        return ConcatSplit([(split.to(device), rows) for split, rows in self.parts])

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        """Return samples by index; see `Split.batch`."""
        xs: list[Tensor] = []
        ys: list[Any] = []
        positions, start = [], 0
        for split, rows in self.parts:
            inside = torch.nonzero((indices >= start) & (indices < start + len(rows))).flatten()
            if len(inside):
                x, y = split.batch(rows[indices[inside] - start], augment)
                xs.append(x)
                ys.append(y)
                positions.append(inside)
            start += len(rows)
        order = torch.argsort(torch.cat(positions)).to(xs[0].device)
        part = part or slice(0, len(indices))
        if isinstance(ys[0], Tensor):
            return Batch(torch.cat(xs)[order][part], torch.cat(ys)[order][part])
        targets = [target for own in ys for target in own]
        return Batch(torch.cat(xs)[order][part], [targets[row] for row in order.tolist()][part])


@dataclass(frozen=True)
class TransformedSplit:
    """Split whose images are changed for the attacked model."""

    split: Split
    transforms: InputTransforms

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.split)

    def to(self, device: torch.device | str) -> TransformedSplit:
        """Return the same split with batches on `device`."""
        return TransformedSplit(self.split.to(device), self.transforms)

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        """Return samples by index; see `Split.batch`."""
        x, y = self.split.batch(indices, augment, part)
        return Batch(transform_inputs(x, self.transforms), y)


class TransformedModel(nn.Module):
    """Deployed model whose operator applies transforms to every input."""

    def __init__(self, model: nn.Module, transforms: InputTransforms) -> None:
        super().__init__()
        self.model, self.transforms = model, transforms

    def forward(self, x: Tensor) -> Any:
        """Return the outputs for inputs of the owner's task."""
        return self.model(transform_inputs(x, self.transforms))


def transform_inputs(x: Tensor, transforms: InputTransforms) -> Tensor:
    """Apply input transforms to images [n, C, H, W] or token ids [n, L]."""
    for transform in transforms:
        if isinstance(transform, TokenRenumbering):
            x = torch.tensor([0, *(number + 1 for number in transform.numbers)], device=x.device)[x]
        elif isinstance(transform, Preprocessing):
            x = _preprocessed(x, transform)
        elif isinstance(transform, ChannelMix):
            x = torch.einsum("dc,nchw->ndhw", x.new_tensor(transform.rows), x)
        else:
            x = -x if transform == "negated" else TURNS[transform](x)
    return x


def _preprocessed(x: Tensor, change: Preprocessing) -> Tensor:
    if change.kind == "smoothed":
        left = change.strength // 2
        right = change.strength - 1 - left
        padded = F.pad(x, (left, right, left, right), mode="replicate")
        return F.avg_pool2d(padded, change.strength, stride=1)
    low, high = x.amin(), x.amax()
    size = (high - low).clamp(min=1e-12) / (change.strength - 1)
    return ((x - low) / size).round() * size + low


def transform_task(task: Task, transforms: InputTransforms) -> Task:
    """Return the task with every input transformed."""
    if not transforms:
        return task
    if isinstance(task.input_spec, TextSpec):
        splits = {name: TransformedSplit(split, transforms) for name, split in task.splits.items()}
        return replace(task, splits=splits)
    images = require_images(task)
    if images.outputs == "instances":
        raise NotApplicableError("The attack would have to change boxes and masks, too.", field="task")
    height, width = images.height, images.width
    if sum(transform in ("transposed", "rotated") for transform in transforms) % 2:
        height, width = width, height
    splits = {name: TransformedSplit(split, transforms) for name, split in task.splits.items()}
    return replace(task, splits=splits, input_spec=replace(images, height=height, width=width))


def require_images(task: Task) -> ImageSpec:
    """Return the images of a task. Raises `NotApplicableError` if its inputs are no images."""
    if isinstance(task.input_spec, ImageSpec):
        return task.input_spec
    raise NotApplicableError(f"The attack changes images, and the task has {task.input_spec}.", field="task")


def require_logits(task: Task) -> None:
    """Raise `NotApplicableError` for detectors and generators, which return no logits of their inputs."""
    if task.input_spec.outputs == "images":
        raise NotApplicableError(
            "The attack reads logits, and a generator returns images. Use tune or relearn.", field="task"
        )
    if task.input_spec.outputs == "instances":
        raise NotApplicableError(
            "The attack reads logits, and a detector returns detections. Use tune or relearn.", field="task"
        )


def attacker_view(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> Task:
    """Return the task with only the attacker's data in every split, on the model's device.

    Code of the owner that an attack reuses therefore cannot read the owner's data, nor choose by test data.

    Args:
        model: the marked model.
        task: the owner's task.
        resources: fraction of the training split that the attacker has, besides the attacker split.
        seed: choice of that fraction.
    """
    attacker_split: Split = task.splits["attacker"]
    if resources.extra_data_fraction > 0:
        train = task.splits["train"]
        count = min(len(train), round(resources.extra_data_fraction * len(train)))
        rows = torch.randperm(len(train), generator=seeded_generator("mtlsign/attack/extra", seed))[:count]
        attacker_split = ConcatSplit([(attacker_split, torch.arange(len(attacker_split))), (train, rows)])
    small_split = ConcatSplit([(attacker_split, torch.arange(min(SMALL_SPLIT, len(attacker_split))))])
    splits: dict[str, Split] = {
        **dict.fromkeys(("train", "inner", "attacker"), attacker_split),
        **dict.fromkeys(("validation", "test"), small_split),
    }
    return replace(task, splits=splits).to(device_of(model))


def attacker_sample(data: Task, count: int = 1) -> Tensor:
    """Return the first images of an attacker's view: float32 [n, C, H, W] with n <= count."""
    images: Tensor = data.splits["attacker"].batch(torch.arange(min(count, data.size("attacker")))).inputs
    return images
