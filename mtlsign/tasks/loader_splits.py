"""Splits of a user's datasets, loaders and iterables."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, default_collate

from mtlsign.errors import DataError
from mtlsign.tasks.base import Split
from mtlsign.tasks.batch import Batch
from mtlsign.tasks.segmentation.user_batches import (
    detection_collate,
    detection_targets,
    is_detection_batch,
    is_detection_sample,
    padded_images,
)
from mtlsign.tasks.tensor_split import InputTransform, TensorSplit
from mtlsign.tasks.text.text_split import TextSplit

#: Largest iterable that is copied into memory.
MAX_BYTES = 2 * 1024**3
#: Names of inputs and targets in batches that are mappings, in order of preference.
INPUT_KEYS = ("pixel_values", "image", "images", "img", "input_ids", "tokens", "x", "inputs", "input")
TARGET_KEYS = ("labels", "label", "y", "targets", "target")


@dataclass(frozen=True)
class DatasetSplit:
    """Rows of a map-style dataset, read sample by sample with seeded generators.

    Attributes:
        dataset: has `__getitem__` and `__len__`.
        rows: int64, the rows of this split.
        collate: joins samples into a pair (x, y) or a mapping that holds one.
        device: device of the batches.
    """

    dataset: Any
    rows: Tensor
    collate: Callable[[list[Any]], Any] = default_collate
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> DatasetSplit:
        """Return the same split with batches on `device`."""
        return replace(self, device=device)

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        """Return samples by index; see `Split.batch`.

        The dataset's transforms always run; without `augment` they run with fixed seeds.
        """
        part = part or slice(0, len(indices))
        if augment is None:
            seeds = self.rows[indices]
        else:
            seeds = torch.randint(2**31, (len(indices),), generator=augment)
        samples = []
        with _preserve_rng_state():
            for row, seed in zip(self.rows[indices[part]].tolist(), seeds[part].tolist(), strict=True):
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
                samples.append(self.dataset[row])
        collate = self.collate
        if collate is default_collate and all(is_detection_sample(sample) for sample in samples):
            collate = detection_collate
        return _validate_batch(collate(samples)).to(self.device)


@contextmanager
def _preserve_rng_state() -> Iterator[None]:
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def _validate_batch(batch: Any) -> Batch:
    if isinstance(batch, Mapping):
        pair = tuple(_entry(batch, keys) for keys in (INPUT_KEYS, TARGET_KEYS))
    else:
        pair = tuple(batch) if isinstance(batch, tuple | list) else ()
    if len(pair) == 2 and is_detection_batch(*pair):
        return Batch(padded_images(pair[0]), detection_targets(pair[1]))
    if len(pair) != 2 or not all(isinstance(tensor, Tensor) for tensor in pair):
        raise DataError(
            "A batch is not a pair of tensors (x, y), nor a mapping with such a pair under "
            f"{' or '.join(INPUT_KEYS)} and {' or '.join(TARGET_KEYS)}. Change the dataset or collate_fn.",
            field="task",
        )
    x, y = pair
    return Batch(_network_inputs(x), y if y.is_floating_point() else y.long())


def _network_inputs(x: Tensor) -> Tensor:
    """Return images as float32, divided by 255 if they are uint8, and token ids [n, L] as int64."""
    if x.ndim == 2 and not x.is_floating_point():
        return x.long()
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def _entry(batch: Mapping[Any, Any], keys: Sequence[str]) -> Any:
    return next((batch[key] for key in keys if key in batch), None)


def as_split(name: str, loader: Any) -> Split:
    """Return the split of a DataLoader, a dataset or an iterable of batches.

    Args:
        name: name of the split, for error messages.
        loader: a map-style dataset is read by index, with or without a DataLoader. Other iterables are
            copied into memory.

    Raises:
        DataError: anything else, an iterable without batches, or one over `MAX_BYTES`.
    """
    if isinstance(loader, DataLoader):
        if not isinstance(loader.dataset, IterableDataset):
            rows = torch.arange(len(loader.dataset))  # type: ignore[arg-type]
            collate = loader.collate_fn if loader.batch_size is not None else default_collate
            return DatasetSplit(loader.dataset, rows, collate or default_collate)
    elif (
        hasattr(loader, "__getitem__") and hasattr(loader, "__len__") and not isinstance(loader, list | tuple)
    ):
        return DatasetSplit(loader, torch.arange(len(loader)))
    if not isinstance(loader, Iterable):
        raise DataError(
            f"{name!r} is a {type(loader).__name__}. Give a DataLoader or a dataset.", field="task"
        )
    return _copied(name, loader)


def _copied(name: str, batches: Iterable[Any]) -> TensorSplit | TextSplit:
    xs, ys, size = [], [], 0
    for batch in batches:
        x, y = _validate_batch(batch)
        if not isinstance(y, Tensor):
            raise DataError(
                f"{name!r} gives targets of a detector. Give their dataset or a DataLoader.", field="task"
            )
        xs.append(x)
        ys.append(y)
        size += x.nbytes + y.nbytes
        if size > MAX_BYTES:
            raise DataError(
                f"{name!r} gives more than {MAX_BYTES / 2**30:.3g} GiB of batches without a dataset to read "
                "by index. Give a map-style dataset (with __getitem__ and __len__).",
                field="task",
            )
    if not xs:
        raise DataError(
            f"{name!r} gives no batch. Give a loader that can be read more than once.", field="task"
        )
    if xs[0].is_floating_point():
        return TensorSplit(torch.cat(xs), torch.cat(ys), torch.arange(sum(map(len, ys))), InputTransform())
    length = max(x.shape[1] for x in xs)
    padded = [F.pad(x, (0, length - x.shape[1])) for x in xs]
    return TextSplit(torch.cat(padded), torch.cat(ys), torch.arange(sum(map(len, ys))))


def subset(split: Split, rows: Tensor) -> Split:
    """Return the split of some rows of a split that `as_split` made."""
    assert isinstance(split, DatasetSplit | TensorSplit | TextSplit)
    return replace(split, rows=split.rows[rows])


def class_labels(split: Split) -> Tensor | None:
    """Return class labels int64 [n] if they are available without reading the samples, else None."""
    values: Any = None
    if isinstance(split, TensorSplit):
        values = split.y
    elif isinstance(split, TextSplit):
        values = split.targets
    elif isinstance(split, DatasetSplit):
        values = getattr(split.dataset, "targets", None)
        tensors = getattr(split.dataset, "tensors", None)
        if values is None and isinstance(tensors, tuple) and len(tensors) == 2:
            values = tensors[1]
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    plain = labels.ndim == 1 and not labels.is_floating_point() and labels.dtype != torch.bool
    return labels.long() if plain and len(labels) == len(split) else None
