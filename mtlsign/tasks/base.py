"""What every primary task offers: five splits, a loss, a metric, and batches that follow from their number.

The global batch depends only on (seed, split, epoch, position), never on the number of workers, so that a run
can be resumed on another number of them; each rank takes a contiguous share of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mtlsign.errors import DataError

#: inner is D' (a tenth of train, inside it; paper §4.1); embedding never sees the attacker's part
SPLITS = ("train", "inner", "validation", "attacker", "test")
VALIDATION, ATTACKER, INNER = 0.05, 0.10, 0.10

Batch = tuple[Tensor, Tensor]


class Split(Protocol):
    """One part of the data with random access."""

    def __len__(self) -> int:
        """Number of samples."""

    def batch(self, indices: Tensor, augment: Generator | None = None, share: slice | None = None) -> Batch:
        """Samples `indices` (int64 [n]): x float32 [n, C, H, W] and y.

        `augment` draws the random changes of all n samples; only the part `share` of them is returned.
        """

    def to(self, device: torch.device | str) -> Split:
        """The same split whose batches lie on `device`."""


def seeded_generator(*parts: object) -> Generator:
    """A CPU generator seeded from SHA-256 of `parts`, independent of torch's global one."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def stratified_permutation(labels: Tensor | int, gen: Generator) -> Tensor:
    """A random order of the samples, int64 [n], of which every stretch holds the classes in proportion.

    `labels` are int64 [n], or the number of samples when there are no classes to keep in proportion.
    """
    if isinstance(labels, int):
        return torch.randperm(labels, generator=gen)
    order = torch.randperm(len(labels), generator=gen)
    shuffled = labels[order]
    place = torch.empty(len(labels), dtype=torch.float64)
    for value in torch.unique(shuffled):
        rows = torch.nonzero(shuffled == value).flatten()
        offset = torch.rand(1, generator=gen, dtype=torch.float64)
        place[rows] = (torch.arange(len(rows), dtype=torch.float64) + offset) / len(rows)
    return order[torch.argsort(place, stable=True)]


def split_training_rows(
    labels: Tensor | int, seed: int, present: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Rows of the official train part for train, inner, validation and attacker (int64), fixed by `seed`.

    Validation gets 5 %, the attacker 10 %, train the rest; inner is 10 % of train, inside it. Parts in
    `present` come from elsewhere and take nothing. Raises DataError when a part would be empty.
    """
    order = stratified_permutation(labels, seeded_generator("mtlsign/splits", seed))
    count, start = len(order), 0
    rows: dict[str, Tensor] = {}
    for name, fraction in (("validation", VALIDATION), ("attacker", ATTACKER)):
        if name not in present:
            size = max(1, round(fraction * count))
            rows[name] = order[start : start + size]
            start += size
    rows["train"] = order[start:]
    if "inner" not in present:
        rows["inner"] = rows["train"][: max(1, round(INNER * (count - start)))]
    if count - start < 2:
        raise DataError(f"{count} training samples are too few to split: give at least 10", field="task")
    return rows


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of logits [n, classes] against labels [n]."""
    return F.cross_entropy(out.float(), y)


def accuracy_per_sample(out: Tensor, y: Tensor) -> Tensor:
    """1 where the largest logit is the label's, else 0: float32 [n]."""
    return (out.argmax(1) == y).float()


@dataclass(frozen=True)
class Task:
    """A primary task: data in five splits, a mean loss, a per-sample metric (float32 [n], more is better)."""

    name: str
    channels: int
    height: int
    width: int
    classes: int
    splits: Mapping[str, Split]
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    correct: Callable[[Tensor, Tensor], Tensor] = accuracy_per_sample
    _orders: dict[tuple[object, ...], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Raise DataError unless all five splits are there and hold something."""
        for name in SPLITS:
            if name not in self.splits or not len(self.splits[name]):
                raise DataError(f"the split {name!r} of {self.name!r} is empty: give more data", field="task")

    def size(self, split: str) -> int:
        """Samples in a split. Raises DataError for an unknown one."""
        return len(self._split(split))

    def steps(self, split: str, batch_size: int) -> int:
        """Whole batches in a shuffled epoch; a split smaller than a batch is one batch."""
        size = self.size(split)
        return size // min(batch_size, size)

    def to(self, device: torch.device | str) -> Task:
        """The same task whose batches lie on `device`."""
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
        """One epoch of batches; `batch_size` is the global batch, of which this rank gets a contiguous share.

        Shuffled, the incomplete last batch is dropped and every rank sees as many batches. In order, it is
        kept, and a rank whose share of it would be empty skips it.
        """
        if shuffle:
            steps = self.steps(split, batch_size)
            for step in range(steps):
                yield self.batch_at(
                    split,
                    batch_size,
                    epoch * steps + step,
                    seed=seed,
                    rank=rank,
                    world=world,
                    augment=augment,
                )
            return
        data, size = self._split(split), self.size(split)
        for step, start in enumerate(range(0, size, batch_size)):
            indices = torch.arange(start, min(start + batch_size, size))
            share = _share(len(indices), rank, world)
            if share.start < share.stop:
                gen = seeded_generator("mtlsign/augment", seed, split, epoch, step) if augment else None
                yield data.batch(indices, gen, share)

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
        """Batch number `step` of the endless stream of shuffled epochs, by random access.

        A split smaller than `batch_size` gives batches of its own size. Shares differ by one sample where
        `world` does not divide the batch. Raises DataError for a batch smaller than `world`.
        """
        data, size = self._split(split), self.size(split)
        batch_size = min(batch_size, size)
        if not 0 <= rank < world or world > batch_size:
            raise DataError(
                f"a global batch of {batch_size} cannot be shared by {world} workers: use a larger batch "
                "or fewer workers",
                field="batch_size",
            )
        epoch, position = divmod(step, size // batch_size)
        order = self._order(split, size, seed, epoch)
        gen = seeded_generator("mtlsign/augment", seed, split, epoch, position) if augment else None
        indices = order[position * batch_size : (position + 1) * batch_size]
        return data.batch(indices, gen, _share(batch_size, rank, world))

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
            raise DataError(f"unknown split {name!r}: use one of {', '.join(self.splits)}", field="split")
        return self.splits[name]

    @staticmethod
    def from_tensors(x: Tensor, y: Tensor, **options: Any) -> Task:
        """A task of tensors in memory: see `mtlsign.tasks.user_task.from_tensors`."""
        from mtlsign.tasks.user_task import from_tensors

        return from_tensors(x, y, **options)

    @staticmethod
    def from_loaders(loaders: Mapping[str, Any], **options: Any) -> Task:
        """A task of the user's own loaders or datasets: see `mtlsign.tasks.user_task.from_loaders`."""
        from mtlsign.tasks.user_task import from_loaders

        return from_loaders(loaders, **options)


def _share(count: int, rank: int, world: int) -> slice:
    return slice(count * rank // world, count * (rank + 1) // world)
