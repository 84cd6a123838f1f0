"""Primary tasks: five splits, a loss, a metric, and batches that follow from their number.

The global batch depends only on (seed, split, epoch, position), never on the number of workers. A run can
therefore be resumed with another number of workers. Each rank takes a contiguous part of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from mtlsign.errors import DataError
from mtlsign.models.input_spec import InputSpec
from mtlsign.tasks.batch import Batch
from mtlsign.tasks.metrics import MeanMetric, MetricFactory, cross_entropy
from mtlsign.tasks.objectives import TargetKind
from mtlsign.tasks.outputs import LogitsFunction, default_logits
from mtlsign.tasks.splitting import SPLITS, seeded_generator


def forward_inputs(network: nn.Module, batch: Batch) -> Any:
    """Return the network's outputs for the inputs of a batch."""
    return network(batch.inputs)


class Split(Protocol):
    """Part of the data with random access."""

    def __len__(self) -> int:
        """Number of samples."""

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        """Return samples by index.

        Args:
            indices: int64 [n].
            augment: generator of the random transforms; it draws for all n samples.
            part: the samples to return, by their position in `indices`; None for all.
        """

    def to(self, device: torch.device | str) -> Split:
        """Return the same split with batches on `device`."""


@dataclass(frozen=True)
class Task:
    """Primary task of a network.

    Attributes:
        name: as `load_task` takes it.
        input_spec: inputs and classes, as networks and carriers are built for them.
        splits: data by the names in `SPLITS`.
        loss: (outputs, targets) -> mean loss.
        metric: builds an empty metric on a device; accuracy by default.
        logits_of: (outputs of the network) -> logits [n, classes, ...], which distillation compares.
        training_outputs: (network, batch) -> outputs of which loss and distillation are computed. Detectors
            need the targets and other modes; all other tasks pass the inputs.
        predictions: (network in evaluation mode, batch) -> outputs that the metric compares with targets.
        targets: kind of the targets; distillation compares probabilities or values accordingly.
        evaluation_batch: samples that are evaluated at once.
        initial_tensors: values of a new network's parameters by name, such as word vectors.
        model_files: files by name that users of a trained network need, such as a tokenizer; public.
        data_digest: SHA-256 (hex) of the list of samples, for data without an official list.
    """

    name: str
    input_spec: InputSpec
    splits: Mapping[str, Split]
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    metric: MetricFactory = MeanMetric
    logits_of: LogitsFunction = default_logits
    training_outputs: Callable[[nn.Module, Batch], Any] = forward_inputs
    predictions: Callable[[nn.Module, Batch], Any] = forward_inputs
    targets: TargetKind = "labels"
    evaluation_batch: int = 500
    initial_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    model_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    data_digest: str | None = None
    _orders: dict[tuple[object, ...], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Raise `DataError` unless all five splits exist and hold samples."""
        for name in SPLITS:
            if name not in self.splits or not len(self.splits[name]):
                raise DataError(
                    f"The split {name!r} of {self.name!r} is empty. Give more data.", field="task"
                )

    @property
    def classes(self) -> int:
        """Outputs of the network."""
        return self.input_spec.classes

    def size(self, split: str) -> int:
        """Return the number of samples in a split. Raises `DataError` for an unknown split."""
        return len(self._split(split))

    def steps(self, split: str, batch_size: int) -> int:
        """Return the number of whole batches in a shuffled epoch; a small split is one batch."""
        size = self.size(split)
        return size // min(batch_size, size)

    def initialize(self, model: nn.Module) -> None:
        """Copy `initial_tensors` into those parameters of a new network that have their names and shapes."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, values in self.initial_tensors.items():
                if name in parameters and parameters[name].shape == values.shape:
                    parameters[name].copy_(values)

    def to(self, device: torch.device | str) -> Task:
        """Return the same task with batches on `device`."""
        return replace(self, splits={name: split.to(device) for name, split in self.splits.items()})

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        epoch: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        augment: bool = False,
    ) -> Iterator[Batch]:
        """Yield one epoch of batches.

        Args:
            split: name of the split.
            batch_size: size of the global batch, over all ranks.
            epoch: number of the epoch.
            seed: seed of order and augmentation.
            rank: this rank, which gets a contiguous part of every global batch.
            world: number of ranks.
            shuffle: random order without the incomplete last batch, so that all ranks get as many batches.
                In order, the last batch is included, and a rank whose part of it is empty skips it.
            augment: whether to apply random transforms.
        """
        if shuffle:
            steps = self.steps(split, batch_size)
            for step in range(epoch * steps, (epoch + 1) * steps):
                yield self.batch_at(
                    split, batch_size, step, seed=seed, rank=rank, world=world, augment=augment
                )
            return
        data, size = self._split(split), self.size(split)
        for step, start in enumerate(range(0, size, batch_size)):
            indices = torch.arange(start, min(start + batch_size, size))
            part = rank_slice(len(indices), rank, world)
            if part.start < part.stop:
                gen = seeded_generator("mtlsign/augment", seed, split, epoch, step) if augment else None
                yield data.batch(indices, gen, part)

    def batch_at(
        self,
        split: str,
        batch_size: int,
        step: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        augment: bool = False,
    ) -> Batch:
        """Return one batch of the endless sequence of shuffled epochs.

        Args:
            split: name of the split.
            batch_size: size of the global batch; a smaller split gives batches of its size.
            step: number of the batch.
            seed: seed of order and augmentation.
            rank: this rank. Parts differ by one sample if `world` does not divide the batch.
            world: number of ranks.
            augment: whether to apply random transforms.

        Raises:
            DataError: the batch has fewer samples than there are ranks.
        """
        data, size = self._split(split), self.size(split)
        batch_size = min(batch_size, size)
        if not 0 <= rank < world or world > batch_size:
            raise DataError(
                f"A global batch of {batch_size} cannot be divided among {world} workers. Use a larger batch "
                "or fewer workers.",
                field="batch_size",
            )
        epoch, position = divmod(step, size // batch_size)
        order = self._order(split, size, seed, epoch)
        gen = seeded_generator("mtlsign/augment", seed, split, epoch, position) if augment else None
        indices = order[position * batch_size : (position + 1) * batch_size]
        return data.batch(indices, gen, rank_slice(batch_size, rank, world))

    def _order(self, split: str, size: int, seed: int, epoch: int) -> Tensor:
        key = (split, size, seed, epoch)
        if key not in self._orders:
            for old in [k for k in self._orders if k[0] == split]:
                del self._orders[old]
            self._orders[key] = torch.randperm(
                size, generator=seeded_generator("mtlsign/order", seed, split, epoch)
            )
        return self._orders[key]

    def _split(self, name: str) -> Split:
        if name not in self.splits:
            raise DataError(
                f"{name!r} is no split of the task. Use one of {', '.join(self.splits)}.", field="split"
            )
        return self.splits[name]


def rank_slice(count: int, rank: int, world: int) -> slice:
    """Return the contiguous part of `count` samples that belongs to a rank."""
    return slice(count * rank // world, count * (rank + 1) // world)
