"""Kinds of targets, and the loss and metric that each kind has by default."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlsign.errors import DataError
from mtlsign.tasks.metrics import MeanMetric, MetricFactory, accuracy_per_sample, cross_entropy
from mtlsign.tasks.outputs import LogitsFunction, default_logits

#: labels: class numbers; distributions: one-hot or soft labels; binary: several labels of 0 and 1;
#: values: real numbers.
TargetKind = Literal["labels", "distributions", "binary", "values"]

#: (outputs, targets) -> a number, or one number per sample.
OutputFunction = Callable[[Any, Any], Any]


def target_kind(targets: Any) -> TargetKind:
    """Return the kind of a batch of targets; targets that are no tensor count as labels."""
    if not isinstance(targets, Tensor) or not targets.numel():
        return "labels"
    columns = targets.ndim > 1 and targets.shape[1] > 1
    values = targets.float()
    binary = bool(((values == 0) | (values == 1)).all())
    sums = values.sum(1) if columns else values
    if columns and bool((values >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
        # Maps of class numbers, as in segmentation, are no distributions.
        return "distributions" if targets.is_floating_point() or targets.ndim == 2 else "labels"
    if targets.is_floating_point():
        return "binary" if binary else "values"
    return "binary" if binary and targets.ndim == 2 and columns else "labels"


def output_count(targets: Tensor) -> int:
    """Return the number of outputs that targets other than labels need."""
    return int(targets.shape[1]) if targets.ndim > 1 else 1


def task_loss(
    loss: OutputFunction | None, logits_of: LogitsFunction | None, kind: TargetKind
) -> Callable[[Any, Any], Tensor]:
    """Return (outputs, targets) -> mean loss.

    Args:
        loss: the caller's loss; None for the default of the kind.
        logits_of: applied to the outputs before the caller's loss; None passes them on unchanged.
        kind: kind of the targets.
    """
    if loss is None:
        return partial(_DEFAULT_LOSSES[kind], logits_of=logits_of or default_logits)
    function = loss

    def mean(outputs: Any, targets: Any) -> Tensor:
        value = function(outputs if logits_of is None else logits_of(outputs), targets)
        if not isinstance(value, Tensor):
            raise DataError(
                f"The loss returned {type(value).__name__}. It must return a tensor.", field="task"
            )
        return value.mean()

    return mean


def task_metric(
    metric: OutputFunction | None, logits_of: LogitsFunction | None, kind: TargetKind
) -> MetricFactory:
    """Return the factory of a metric; see `task_loss` for the arguments."""
    if metric is None:
        default = partial(_DEFAULT_METRICS[kind], logits_of=logits_of or default_logits)
        return partial(MeanMetric, per_sample=default)
    function = metric

    def per_sample(outputs: Any, targets: Any) -> Tensor:
        outputs = outputs if logits_of is None else logits_of(outputs)
        value = torch.as_tensor(function(outputs, targets), dtype=torch.float32)
        count = len(targets)
        if value.ndim > 1 or (value.ndim == 1 and len(value) != count):
            raise DataError(
                f"The metric returned the shape {list(value.shape)}. It must return one number, or one per "
                "sample.",
                field="task",
            )
        return value if value.ndim else value.expand(count)

    return partial(MeanMetric, per_sample=per_sample)


def _squared_error(outputs: Any, targets: Tensor, *, logits_of: LogitsFunction) -> Tensor:
    return F.mse_loss(logits_of(outputs).float().reshape(targets.shape), targets.float())


def _binary_cross_entropy(outputs: Any, targets: Tensor, *, logits_of: LogitsFunction) -> Tensor:
    logits = logits_of(outputs).float().reshape(targets.shape)
    return F.binary_cross_entropy_with_logits(logits, targets.float())


def _negative_squared_errors(outputs: Any, targets: Tensor, *, logits_of: LogitsFunction) -> Tensor:
    return -(logits_of(outputs).float().reshape(targets.shape) - targets).square()


def _correct_labels(outputs: Any, targets: Tensor, *, logits_of: LogitsFunction) -> Tensor:
    return ((logits_of(outputs).reshape(targets.shape) > 0) == (targets > 0.5)).float()


_DEFAULT_LOSSES: dict[TargetKind, Callable[..., Tensor]] = {
    "labels": cross_entropy,
    "distributions": cross_entropy,
    "binary": _binary_cross_entropy,
    "values": _squared_error,
}
_DEFAULT_METRICS: dict[TargetKind, Callable[..., Tensor]] = {
    "labels": accuracy_per_sample,
    "distributions": accuracy_per_sample,
    "binary": _correct_labels,
    "values": _negative_squared_errors,
}
