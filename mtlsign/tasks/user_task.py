"""Tasks of the user: tensors, datasets or loaders with the same splits as the built-in tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtlsign.errors import DataError
from mtlsign.models.factories import call_factory, load_factory
from mtlsign.models.input_spec import ImageSpec, InputSpec, TextSpec
from mtlsign.tasks.base import Split, Task
from mtlsign.tasks.batch import Batch
from mtlsign.tasks.loader_splits import as_split, class_labels, subset
from mtlsign.tasks.objectives import (
    OutputFunction,
    TargetKind,
    output_count,
    target_kind,
    task_loss,
    task_metric,
)
from mtlsign.tasks.outputs import LogitsFunction, default_logits
from mtlsign.tasks.segmentation.detection import detection_fields
from mtlsign.tasks.splitting import (
    SPLITS,
    seeded_generator,
    split_training_rows,
    stratified_permutation,
)
from mtlsign.tasks.tensor_split import InputTransform, tensor_splits

FIELDS = {"loaders", "loss", "metric", "logits_of", "classes", "vocabulary", "name"}
#: Samples whose targets show their kind.
_KIND_SAMPLES = 32
#: Texts of one batch when the token ids are checked.
_SCANNED = 1024


def load_user_task(path: str, *, seed: int, options: Mapping[str, object] | None = None) -> Task:
    """Load the task of a factory.

    Args:
        path: `package.module:function`. The function returns a `Task`, or a dict with `loaders` (see
            `from_loaders`) and optionally `loss`, `metric`, `logits_of`, `classes`, `vocabulary` and `name`.
        seed: division of the training part; passed to a function that accepts it.
        options: further keyword arguments; the function receives those that it accepts.

    Raises:
        ModelError: the factory cannot be imported.
        DataError: its result is unusable.
    """
    factory = load_factory(path, field="task")
    result = call_factory(path, factory, {"seed": seed, **(options or {})}, field="task")
    if isinstance(result, Task):
        return result
    if not isinstance(result, Mapping):
        raise DataError(
            f"{path!r} returned {type(result).__name__}. It must return a Task or a dict.", field="task"
        )
    if "loaders" not in result or set(result) - FIELDS:
        raise DataError(
            f"{path!r} returned the keys {sorted(map(str, result))[:10]}. It must return 'loaders' and at "
            f"most {', '.join(sorted(FIELDS - {'loaders'}))}.",
            field="task",
        )
    rest = {key: value for key, value in result.items() if key != "loaders"}
    return from_loaders(result["loaders"], seed=seed, **{"name": path.replace(":", "."), **rest})


def from_loaders(
    loaders: Mapping[str, Any],
    *,
    loss: OutputFunction | None = None,
    metric: OutputFunction | None = None,
    logits_of: LogitsFunction | None = None,
    classes: int | None = None,
    count_outputs: Callable[[Any], int] | None = None,
    vocabulary: int | None = None,
    name: str = "custom",
    seed: int = 0,
) -> Task:
    """Build a task of DataLoaders, datasets or iterables of batches.

    A batch is a pair (x, y), or a mapping with `pixel_values`, `image`, `input_ids`, `tokens`, `x` or
    `inputs` and `labels`, `label`, `y` or `targets`. x holds images [n, C, H, W], or whole numbers [n, L]:
    the token ids of texts, with 0 after the last token. For a detector, a batch is a list of images [C, H, W]
    and a list of mappings with `boxes`, `labels` and possibly `masks`, as in torchvision.

    The batch size, order, sampler and processes of a DataLoader are not used. Its dataset is read by index
    through its collate function. The generators of torch, numpy and Python are seeded for each sample, so
    that the dataset's random transforms are the same for any number of workers. An iterable without a
    dataset is copied into memory (at most 2 GiB).

    Args:
        loaders: `train` and `test`, optionally `validation`, `attacker` and `inner`. Missing splits are
            taken from train by `seed`, with train's transforms.
        loss: (outputs, y) -> mean loss. By default cross-entropy for labels, one-hot or soft labels; binary
            cross-entropy for several labels of 0 and 1; squared error for real numbers.
        metric: (outputs, y) -> one number, or one per sample; accuracy by default, for real numbers the
            negative squared error.
        logits_of: (outputs of the network) -> logits, for networks that do not return a tensor; see
            `default_logits`. If it is given, loss and metric receive its result.
        classes: outputs of the network; by default as many as there are labels.
        count_outputs: (inputs of a batch) -> outputs of the network, if the targets do not show `classes`.
        vocabulary: number of token ids of texts; by default that of the largest id in the data.
        name: name of the task.
        seed: division of the training part.

    Raises:
        DataError: loaders that do not fit this description.
    """
    splits = _given_splits(loaders)
    train = splits["train"]
    labels = class_labels(train)
    rows = split_training_rows(len(train) if labels is None else labels, seed, frozenset(splits) - {"train"})
    splits |= {split: subset(train, chosen) for split, chosen in rows.items()}
    kind: TargetKind = "labels"
    if labels is None:
        examples = splits["train"].batch(torch.arange(min(_KIND_SAMPLES, len(splits["train"]))))
        if isinstance(examples.targets, list):
            return _detection_task(name, splits, examples, classes, loss, metric, logits_of)
        kind, counted = _kind_and_outputs(examples, count_outputs)
        classes = counted if classes is None else classes
    elif classes is None:
        classes = int(labels.max()) + 1
    if classes is None:
        raise DataError("The number of classes is unknown. Return it as 'classes'.", field="task")
    objectives = _objectives(kind, loss, metric, logits_of)
    return Task(name, _input_spec(splits, int(classes), vocabulary), splits, **objectives)


def _detection_task(
    name: str,
    splits: Mapping[str, Split],
    examples: Batch,
    classes: int | None,
    loss: OutputFunction | None,
    metric: OutputFunction | None,
    logits_of: LogitsFunction | None,
) -> Task:
    """Return the task of a detector; see `from_loaders` for the arguments.

    Raises:
        DataError: a loss or metric is given, which a detector has itself, or no image has objects.
    """
    if loss is not None or metric is not None or logits_of is not None:
        raise DataError(
            "A detector returns its losses, and its metric is the average precision. Leave out loss, metric "
            "and logits_of.",
            field="task",
        )
    largest = max((int(t["labels"].max()) for t in examples.targets if len(t["labels"])), default=0)
    if not largest:
        raise DataError("The first images have no objects. Give other data.", field="task")
    channels, height, width = (int(n) for n in examples.inputs.shape[1:])
    spec = ImageSpec(channels, height, width, classes or largest, outputs="instances")
    return Task(name, spec, splits, **detection_fields())


def _input_spec(splits: Mapping[str, Split], classes: int, vocabulary: int | None) -> InputSpec:
    """Return the description of the inputs of all splits. Raises `DataError` unless they have one shape."""
    if splits["train"].batch(torch.arange(1)).inputs.is_floating_point():
        return ImageSpec(*_image_shape(splits), classes)
    batches = [
        split.batch(torch.arange(start, min(start + _SCANNED, len(split)))).inputs
        for split in splits.values()
        for start in range(0, len(split), _SCANNED)
    ]
    smallest, largest = min(int(x.min()) for x in batches), max(int(x.max()) for x in batches)
    if smallest < 0 or (vocabulary is not None and largest >= vocabulary):
        raise DataError(
            f"The token ids are from {smallest} to {largest}. Give ids from 0 to {(vocabulary or 0) - 1}."
            if vocabulary
            else f"The token ids begin at {smallest}. Give ids from 0.",
            field="task",
        )
    length = max(x.shape[1] for x in batches)
    return TextSpec(vocabulary or largest + 1, None, length, classes)


def _given_splits(loaders: Any) -> dict[str, Split]:
    """Return the splits of the loaders. Raises `DataError` for other names and for empty splits."""
    if (
        not isinstance(loaders, Mapping)
        or not {"train", "test"} <= set(loaders)
        or set(loaders) - set(SPLITS)
    ):
        raise DataError(
            f"The loaders must name train and test, and at most {', '.join(SPLITS)}. Correct the names.",
            field="task",
        )
    splits = {split: as_split(split, loader) for split, loader in loaders.items()}
    for split, data in splits.items():
        if not len(data):
            raise DataError(f"{split!r} is empty. Give more data.", field="task")
    return splits


def _kind_and_outputs(
    examples: Batch, count_outputs: Callable[[Any], int] | None
) -> tuple[TargetKind, int | None]:
    """Return the kind of the targets, and the outputs of the network if targets or network show them."""
    kind = target_kind(examples.targets)
    if kind == "distributions":
        return kind, output_count(examples.targets)
    return kind, None if count_outputs is None else count_outputs(examples.inputs[:2])


def _objectives(
    kind: TargetKind,
    loss: OutputFunction | None,
    metric: OutputFunction | None,
    logits_of: LogitsFunction | None,
) -> dict[str, Any]:
    """Return the fields of `Task` that depend on the kind of its targets."""
    return {
        "loss": task_loss(loss, logits_of, kind),
        "metric": task_metric(metric, logits_of, kind),
        "logits_of": logits_of or default_logits,
        "targets": kind,
    }


def _image_shape(splits: Mapping[str, Split]) -> tuple[int, int, int]:
    """Return (channels, height, width). Raises `DataError` unless all splits have images of one shape."""
    shapes = {name: list(split.batch(torch.arange(1)).inputs.shape) for name, split in splits.items()}
    first = shapes["train"]
    if len(first) != 4:
        raise DataError(f"A batch of x has shape {first}. Return images [n, C, H, W].", field="task")
    for name, shape in shapes.items():
        if shape[1:] != first[1:]:
            raise DataError(
                f"x is {first[1:]} in 'train' and {shape[1:]} in {name!r}. Make them equal.", field="task"
            )
    channels, height, width = (int(n) for n in first[1:])
    return channels, height, width


def from_tensors(
    x: Tensor,
    y: Tensor,
    *,
    test: tuple[Tensor, Tensor] | None = None,
    loss: OutputFunction | None = None,
    metric: OutputFunction | None = None,
    logits_of: LogitsFunction | None = None,
    classes: int | None = None,
    transform: InputTransform | None = None,
    name: str = "custom",
    seed: int = 0,
) -> Task:
    """Build a task of images and targets in memory.

    Args:
        x: uint8 or float32 [N, C, H, W]; uint8 is divided by 255.
        y: int64 [N], or other targets with their loss.
        test: images and targets of the test split; by default a fifth of (x, y), by class if there are
            classes.
        loss: (outputs, y) -> mean loss; see `from_loaders` for the defaults.
        metric: (outputs, y) -> one number, or one per sample; see `from_loaders` for the defaults.
        logits_of: (outputs of the network) -> logits; see `from_loaders`.
        classes: outputs of the network; by default as many as there are labels.
        transform: normalisation and augmentation.
        name: name of the task.
        seed: division of the training part, and the default test split.

    Raises:
        DataError: other shapes, or an unknown number of classes.
    """
    x, y = _check_tensors(x, y)
    has_classes = y.ndim == 1 and not y.is_floating_point()
    if test is None:
        order = stratified_permutation(
            y if has_classes else len(y), seeded_generator("mtlsign/own/test", seed)
        )
        count = max(1, round(0.2 * len(y)))
        test, x, y = (x[order[:count]], y[order[:count]]), x[order[count:]], y[order[count:]]
    else:
        test = _check_tensors(*test)
    kind = target_kind(y[:_KIND_SAMPLES])
    if classes is None and kind == "distributions":
        classes = output_count(y)
    if classes is None:
        if not has_classes:
            raise DataError("The number of classes is unknown. Give classes=.", field="task")
        classes = int(max(y.max(), test[1].max())) + 1
    rows = split_training_rows(y if has_classes else len(y), seed)
    splits = tensor_splits(x, y, rows, transform or InputTransform(), test)
    channels, height, width = (int(n) for n in x.shape[1:])
    objectives = _objectives(kind, loss, metric, logits_of)
    return Task(name, ImageSpec(channels, height, width, int(classes)), splits, **objectives)


def _check_tensors(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 4 or len(x) != len(y):
        raise DataError(
            f"x is {list(x.shape)} and y {list(y.shape)}. Give images [N, C, H, W] and N labels.",
            field="task",
        )
    integral = not y.is_floating_point()
    return (x if x.dtype == torch.uint8 else x.float()), (y.long() if integral else y)
