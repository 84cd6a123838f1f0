"""The user's own task: loaders, datasets or tensors behind the protocol of the built-in ones (decision 7)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from mtlsign.errors import DataError
from mtlsign.models.factories import call_factory, load_factory
from mtlsign.tasks.base import (
    SPLITS,
    Batch,
    Split,
    Task,
    accuracy_per_sample,
    cross_entropy,
    seeded_generator,
    split_training_rows,
    stratified_permutation,
)
from mtlsign.tasks.tensor_split import InputTransform, TensorSplit, tensor_splits

MAX_BYTES = 2 * 1024**3
FIELDS = {"loaders", "loss", "metric", "classes", "name"}

Loss = Callable[[Tensor, Tensor], Any]


def load_user_task(path: str, *, seed: int, options: Mapping[str, object] | None = None) -> Task:
    """Call the factory `package.module:function` with those of `options` it names; it gives a Task or a dict.

    The dict has `loaders` ({"train", "test", optionally "validation", "attacker", "inner"}), and optionally
    `loss` (out, y) -> mean, `metric` (out, y) -> one number or one per sample, `classes` and `name`. Raises
    ModelError when the factory cannot be imported and DataError when what it returns cannot be used.
    """
    factory = load_factory(path, field="task")
    made = call_factory(path, factory, {"seed": seed, **(options or {})}, field="task")
    if isinstance(made, Task):
        return made
    if not isinstance(made, Mapping):
        raise DataError(f"{path} returned {type(made).__name__}: return a Task or a dict", field="task")
    if "loaders" not in made or set(made) - FIELDS:
        raise DataError(
            f"{path} returned the keys {sorted(map(str, made))[:10]}: return 'loaders' and at most "
            f"{', '.join(sorted(FIELDS - {'loaders'}))}",
            field="task",
        )
    rest = {key: value for key, value in made.items() if key != "loaders"}
    return from_loaders(made["loaders"], seed=seed, **{"name": path.replace(":", "."), **rest})


def from_loaders(
    loaders: Mapping[str, Any],
    *,
    loss: Loss | None = None,
    metric: Loss | None = None,
    classes: int | None = None,
    name: str = "own",
    seed: int = 0,
) -> Task:
    """A task of DataLoaders, datasets or iterables of (x, y) batches; `train` and `test` are required.

    A loader's batch size, order, sampler and processes are not used: its dataset is read by index, through
    its collate function, and torch's, numpy's and Python's generators are seeded for each sample, so that the
    dataset's own random transforms are the same on any number of workers. An iterable without a dataset is
    copied into memory (at most 2 GiB). Missing parts are carved out of train by `seed` and keep train's
    transforms. `loss` defaults to cross-entropy, `metric` to accuracy. Raises DataError for anything else.
    """
    if (
        not isinstance(loaders, Mapping)
        or not {"train", "test"} <= set(loaders)
        or set(loaders) - set(SPLITS)
    ):
        raise DataError(f"loaders must name train and test, and at most {', '.join(SPLITS)}", field="task")
    splits: dict[str, Split] = {part: _as_split(part, loader) for part, loader in loaders.items()}
    for part, split in splits.items():
        if not len(split):
            raise DataError(f"{part} is empty: give more data", field="task")
    train = splits["train"]
    labels = _labels(train)
    rows = split_training_rows(len(train) if labels is None else labels, seed, frozenset(splits) - {"train"})
    splits |= {part: _subset(train, chosen) for part, chosen in rows.items()}
    x, _ = splits["train"].batch(torch.arange(1))
    if x.ndim != 4:
        raise DataError(f"a batch of x has shape {list(x.shape)}: return images [n, C, H, W]", field="task")
    for part, split in splits.items():
        if (shape := split.batch(torch.arange(1))[0].shape[1:]) != x.shape[1:]:
            raise DataError(
                f"x is {list(x.shape[1:])} in train and {list(shape)} in {part}: make them equal",
                field="task",
            )
    if classes is None:
        if labels is None:
            raise DataError("the number of classes is not known: return it as 'classes'", field="task")
        classes = int(labels.max()) + 1
    channels, height, width = (int(n) for n in x.shape[1:])
    return Task(name, channels, height, width, int(classes), splits, _mean_loss(loss), _per_sample(metric))


def from_tensors(
    x: Tensor,
    y: Tensor,
    *,
    test: tuple[Tensor, Tensor] | None = None,
    loss: Loss | None = None,
    metric: Loss | None = None,
    classes: int | None = None,
    recipe: InputTransform | None = None,
    name: str = "own",
    seed: int = 0,
) -> Task:
    """A task of images x [N, C, H, W] (uint8 or float32) and labels y (int64 [N], or others with their loss).

    Without `test`, a fifth is held out, by class where y has classes. uint8 is divided by 255; both are then
    normalised by `recipe`. Raises DataError for other shapes.
    """
    x, y = _check_tensors(x, y)
    has_classes = y.ndim == 1 and not y.is_floating_point()
    if test is None:
        order = stratified_permutation(
            y if has_classes else len(y), seeded_generator("mtlsign/own/test", seed)
        )
        held = max(1, round(0.2 * len(y)))
        test, x, y = (x[order[:held]], y[order[:held]]), x[order[held:]], y[order[held:]]
    else:
        test = _check_tensors(*test)
    if classes is None:
        if not has_classes:
            raise DataError("the number of classes is not known: give classes=", field="task")
        classes = int(max(y.max(), test[1].max())) + 1
    splits = tensor_splits(
        x, y, split_training_rows(y if has_classes else len(y), seed), recipe or InputTransform(), test
    )
    channels, height, width = (int(n) for n in x.shape[1:])
    return Task(name, channels, height, width, int(classes), splits, _mean_loss(loss), _per_sample(metric))


def _check_tensors(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 4 or len(x) != len(y):
        raise DataError(
            f"x is {list(x.shape)} and y {list(y.shape)}: give images [N, C, H, W] and N labels", field="task"
        )
    integral = not y.is_floating_point()
    return (x if x.dtype == torch.uint8 else x.float()), (y.long() if integral else y)


@dataclass(frozen=True)
class DatasetSplit:
    """Rows of a map-style dataset, read sample by sample with seeded generators."""

    dataset: Any
    rows: Tensor
    collate: Callable[[list[Any]], Any] = default_collate
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> DatasetSplit:
        """The same split whose batches lie on `device`."""
        return replace(self, device=device)

    def batch(self, indices: Tensor, augment: Generator | None = None, share: slice | None = None) -> Batch:
        """See `Split.batch`; the dataset's transforms always run, with fixed seeds if `augment` is None."""
        share = share or slice(0, len(indices))
        if augment is None:
            seeds = self.rows[indices]
        else:
            seeds = torch.randint(2**31, (len(indices),), generator=augment)
        samples = []
        with _preserve_rng_state():
            for row, seed in zip(self.rows[indices[share]].tolist(), seeds[share].tolist(), strict=True):
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
                samples.append(self.dataset[row])
        x, y = _validate_batch(self.collate(samples))
        return x.to(self.device), y.to(self.device)


@contextmanager
def _preserve_rng_state() -> Any:
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def _validate_batch(batch: Any) -> Batch:
    if (
        not isinstance(batch, tuple | list)
        or len(batch) != 2
        or not all(isinstance(t, Tensor) for t in batch)
    ):
        raise DataError(
            "a batch must be a pair of tensors (x, y): change the dataset or collate_fn", field="task"
        )
    x, y = batch
    return (x.float() / 255 if x.dtype == torch.uint8 else x.float()), (
        y if y.is_floating_point() else y.long()
    )


def _as_split(part: str, loader: Any) -> Split:
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
        raise DataError(f"{part} is a {type(loader).__name__}: give a DataLoader or a dataset", field="task")
    xs, ys, size = [], [], 0
    for batch in loader:
        x, y = _validate_batch(batch)
        xs.append(x)
        ys.append(y)
        size += x.nbytes + y.nbytes
        if size > MAX_BYTES:
            raise DataError(
                f"{part} gives more than {MAX_BYTES / 2**30:.3g} GiB of batches without a dataset to read by "
                "index: give a map-style dataset (with __getitem__ and __len__)",
                field="task",
            )
    if not xs:
        raise DataError(f"{part} gives no batch: give a loader that can be read more than once", field="task")
    return TensorSplit(torch.cat(xs), torch.cat(ys), torch.arange(sum(map(len, ys))), InputTransform())


def _subset(split: Split, rows: Tensor) -> Split:
    assert isinstance(split, DatasetSplit | TensorSplit)
    return replace(split, rows=split.rows[rows])


def _labels(split: Split) -> Tensor | None:
    """Class labels int64 [n] where they can be had without reading the samples, else None."""
    found: Any = None
    if isinstance(split, TensorSplit):
        found = split.y
    elif isinstance(split, DatasetSplit):
        found = getattr(split.dataset, "targets", None)
        if (
            found is None
            and isinstance(tensors := getattr(split.dataset, "tensors", None), tuple)
            and len(tensors) == 2
        ):
            found = tensors[1]
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    plain = labels.ndim == 1 and not labels.is_floating_point() and labels.dtype != torch.bool
    return labels.long() if plain and len(labels) == len(split) else None


def _mean_loss(loss: Loss | None) -> Callable[[Tensor, Tensor], Tensor]:
    if loss is None:
        return cross_entropy
    given = loss

    def mean(out: Tensor, y: Tensor) -> Tensor:
        value = given(out, y)
        if not isinstance(value, Tensor):
            raise DataError("the loss must return a tensor: change it", field="task")
        return value.mean()

    return mean


def _per_sample(metric: Loss | None) -> Callable[[Tensor, Tensor], Tensor]:
    if metric is None:
        return accuracy_per_sample
    given = metric

    def correct(out: Tensor, y: Tensor) -> Tensor:
        value = torch.as_tensor(given(out, y), dtype=torch.float32, device=out.device)
        if value.ndim > 1 or (value.ndim == 1 and len(value) != len(out)):
            raise DataError("the metric must return one number, or one per sample: change it", field="task")
        return value if value.ndim else value.expand(len(out))

    return correct
