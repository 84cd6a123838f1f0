"""Transfer learning: a new last layer, and training on data of another task.

The attacked model answers other classes. Its accuracy on the owner's task is therefore not defined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mtlsign.attacks.attacker_data import ConcatSplit, attacker_view, require_logits
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    Epochs,
    LearningRate,
    NotApplicableError,
    device_of,
    seeded,
)
from mtlsign.attacks.fine_tuning import last_layer
from mtlsign.attacks.training import train_supervised, trainable_copy
from mtlsign.models.input_spec import ImageSpec, InputSpec, LatentSpec
from mtlsign.tasks import Batch, Split, Task
from mtlsign.tasks.splitting import seeded_generator

#: Samples whose labels are read at once.
_CHUNK = 500


@dataclass(frozen=True)
class ChangedSplit:
    """Split with other class numbers, and images of another size.

    Attributes:
        split: the samples.
        numbers: int64 [classes], the new number of each class; None to keep them.
        size: (height, width) of the images; None to keep it.
    """

    split: Split
    numbers: Tensor | None = None
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.split)

    def to(self, device: torch.device | str) -> ChangedSplit:
        """Return the same split with batches on `device`."""
        return replace(self, split=self.split.to(device))

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        """Return samples by index; see `Split.batch`."""
        inputs, targets = self.split.batch(indices, augment, part)
        if self.size is not None:
            inputs = F.interpolate(inputs, size=self.size, mode="bilinear")
        return Batch(inputs, targets if self.numbers is None else self.numbers.to(targets.device)[targets])


def transfer(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    to: Literal["half", "task"] = "half",
    layers: Literal["all", "last"] = "all",
    lr: LearningRate = "quarter",
    epochs: Epochs = 5,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Replace the last layer and train on another task.

    The other task is that of `--transfer-task` with its whole training split (`to=task`), or half of the
    owner's classes on the attacker's data (`to=half`). The outcome holds the new task.
    """
    require_logits(task)
    if task.targets != "labels" or task.input_spec.outputs == "tokens":
        raise NotApplicableError("The task has no classes. Use tune or relearn.", field="task")
    if to == "half":
        new_task = _half_of_classes(model, task, resources, seed)
    else:
        new_task = _other_task(task, resources)
    new_task = new_task.to(device_of(model))
    tuned = _with_outputs(model, new_task.classes, seed)
    parameters = tuned.parameters() if layers == "all" else last_layer(tuned).parameters()
    outcome = train_supervised(
        tuned.train(), new_task, resources, seed, lr=resources.learning_rate(lr), epochs=epochs, batch=batch,
        parameters=parameters,
    )  # fmt: skip
    return replace(outcome, task=new_task)


def _half_of_classes(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> Task:
    """Return the task of half of the classes: the attacker's data, and the owner's test split for reports."""
    count = task.classes // 2
    if count < 2:
        raise NotApplicableError(
            f"Half of {task.classes} classes is no task. Give another one with --transfer-task.",
            field="transfer-task",
        )
    order = torch.randperm(task.classes, generator=seeded_generator("mtlsign/attack/transfer", seed))
    numbers = torch.zeros(task.classes, dtype=torch.int64)
    numbers[order[:count]] = torch.arange(count)
    data = attacker_view(model, task, resources, seed)
    sources: Mapping[str, Split] = {**data.splits, "test": task.splits["test"]}
    rows = {id(split): _rows_of_classes(split, order[:count]) for split in sources.values()}
    if not all(len(chosen) for chosen in rows.values()):
        raise NotApplicableError("The attacker has no data of these classes.", field="task")
    splits = {
        name: ChangedSplit(ConcatSplit([(split, rows[id(split)])]), numbers)
        for name, split in sources.items()
    }
    return replace(task, input_spec=_with_classes(task.input_spec, count), splits=splits)


def _with_classes(spec: InputSpec, classes: int) -> InputSpec:
    """Return the description of the same inputs with another number of classes."""
    assert not isinstance(spec, LatentSpec)
    return replace(spec, classes=classes)


def _rows_of_classes(split: Split, classes: Tensor) -> Tensor:
    """Return the rows of a split whose label is one of `classes`, int64."""
    parts = torch.arange(len(split)).split(_CHUNK)
    labels = torch.cat([split.batch(part).targets.cpu() for part in parts])
    return torch.nonzero(torch.isin(labels, classes)).flatten()


def _other_task(task: Task, resources: AttackerResources) -> Task:
    """Return the attacker's own task, with all its training data as the attacker's."""
    other = resources.transfer_task
    if other is None:
        raise NotApplicableError(
            "The attacker has no other task. Pass --transfer-task.", field="transfer-task"
        )
    spec, own = other.input_spec, task.input_spec
    size = None
    if isinstance(spec, ImageSpec) and isinstance(own, ImageSpec) and spec.channels == own.channels:
        size = None if (spec.height, spec.width) == (own.height, own.width) else (own.height, own.width)
        spec = replace(spec, height=own.height, width=own.width)
    if other.targets != "labels" or _with_classes(spec, own.classes) != own:
        raise NotApplicableError(
            f"The other task has {other.input_spec}, and the model reads {own}. Give a task of the same kind "
            "of inputs with classes.",
            field="transfer-task",
        )
    splits = {name: ChangedSplit(split, size=size) for name, split in other.splits.items()}
    return replace(other, input_spec=spec, splits={**splits, "attacker": splits["train"]})


def _with_outputs(model: nn.Module, classes: int, seed: int) -> nn.Module:
    """Return a copy with a new last layer of so many outputs."""
    tuned = trainable_copy(model)
    old = last_layer(tuned)
    name = next(name for name, module in tuned.named_modules() if module is old)
    with seeded("transfer", seed):
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    parent, _, attribute = name.rpartition(".")
    setattr(tuned.get_submodule(parent), attribute, new.to(old.weight))
    return tuned
