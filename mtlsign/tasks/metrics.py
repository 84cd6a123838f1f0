"""Metrics of primary tasks, and the default loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlsign.tasks.outputs import LogitsFunction, default_logits


class Metric(Protocol):
    """Quality of a network's outputs on a split; higher is better.

    A metric accumulates batches in `state`. The states of several ranks are merged by their sum
    (`WorkerContext.all_reduce_sum`). Counts of a confusion matrix fit into such a state, too.

    Attributes:
        state: float64 [k] on the metric's device.
    """

    state: Tensor

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch to the state."""

    def value(self) -> float:
        """Return the metric over all samples in the state."""

    def scores(self) -> dict[str, float]:
        """Return further figures over these samples by name, such as the perplexity."""


#: Builds an empty metric whose state is on the given device.
MetricFactory = Callable[[torch.device | str], Metric]


def cross_entropy(outputs: Any, y: Tensor, *, logits_of: LogitsFunction = default_logits) -> Tensor:
    """Return the mean cross-entropy in float32.

    Args:
        outputs: outputs of the network, with logits [n, classes, ...].
        y: labels [n, ...], or the probabilities of all classes in the shape of the logits.
        logits_of: selects the logits.
    """
    logits = logits_of(outputs).float()
    return F.cross_entropy(logits, y.float() if y.ndim == logits.ndim else y)


def accuracy_per_sample(outputs: Any, y: Tensor, *, logits_of: LogitsFunction = default_logits) -> Tensor:
    """Return 1 for samples whose largest logit is that of the label, else 0: float32 [n].

    Args:
        outputs: outputs of the network, with logits [n, classes, ...].
        y: labels [n, ...], or the probabilities of all classes in the shape of the logits.
        logits_of: selects the logits.
    """
    logits = logits_of(outputs)
    labels = y.argmax(1) if y.ndim == logits.ndim else y
    return (logits.argmax(1) == labels).float()


class MeanMetric:
    """Mean over samples of a number per sample, such as accuracy.

    Args:
        device: device of the state.
        per_sample: (outputs, targets) -> float32 [n].
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        per_sample: Callable[[Any, Any], Tensor] = accuracy_per_sample,
    ) -> None:
        self.state = torch.zeros(2, dtype=torch.float64, device=device)
        self._per_sample = per_sample

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch: the sum of its numbers, and their count."""
        values = self._per_sample(outputs, targets)
        self.state += torch.tensor(
            [float(values.sum()), float(values.numel())], dtype=torch.float64, device=self.state.device
        )

    def value(self) -> float:
        """Return the mean; 0 without samples."""
        return float(self.state[0] / self.state[1].clamp(min=1))

    def scores(self) -> dict[str, float]:
        """Return no further figures."""
        return {}
