"""Training that the comparators share: the primary loss plus a watermark term, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import DivergedError, ModelError
from mtlsign.schemes.base import SchemeResult, SchemeSettings
from mtlsign.tasks import Batch, Task
from mtlsign.watermark.embedding.loop import evaluate, seed_torch
from mtlsign.watermark.embedding.worker import WorkerContext

#: Steps between rows of metrics.
ROW_STEPS = 50
#: (step, primary batch) -> loss with gradients.
Objective = Callable[[int, Batch], Tensor]


@dataclass(frozen=True)
class Optimizer:
    """Optimiser of an embedding. The learning rate falls to 0 along a cosine.

    Attributes:
        kind: "sgd" has momentum 0.9.
        lr: learning rate at the start.
        weight_decay: L2 penalty.
        extra_lr: learning rate at the start of the key's own parameters, such as an extractor.
    """

    kind: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.01
    weight_decay: float = 5e-4
    extra_lr: float = 0.01

    def build(self, parameters: Sequence[Tensor], extra: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser of a model's parameters and of the key's own ones."""
        groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": self.lr, "peak": self.lr}]
        if extra:
            further = {"lr": self.extra_lr, "peak": self.extra_lr, "weight_decay": 0.0}
            groups.append({"params": list(extra), **further})
        if self.kind == "adam":
            return torch.optim.Adam(groups, weight_decay=self.weight_decay)
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=self.weight_decay)


def train_watermark(
    model: nn.Module,
    task: Task,
    settings: SchemeSettings,
    worker: WorkerContext,
    *,
    objective: Objective,
    optimizer: Optimizer,
    extra: Sequence[Tensor] = (),
    key_inputs: int = 0,
) -> SchemeResult:
    """Minimise an objective on primary batches, in place; the model ends in evaluation mode.

    Args:
        model: on the worker's device.
        task: primary task with batches on that device.
        settings: steps, batch and seed.
        worker: the only process.
        objective: loss of a step, with the model in training mode.
        optimizer: optimiser.
        extra: parameters of the key that are trained as well.
        key_inputs: key samples in one step, for the count of images.

    Raises:
        DivergedError: a loss is not finite.
        ModelError: there is more than one worker.
    """
    if worker.world_size > 1:
        raise ModelError("Comparators train in one process. Use one worker.", field="workers")
    model.to(worker.device)
    clean = accuracies(model, task, worker, "clean")
    steps, batch = settings.steps, min(settings.batch, task.size("train"))
    optimiser = optimizer.build([p for p in model.parameters() if p.requires_grad], extra)
    rows: list[dict[str, Any]] = []
    model.train()
    for step in range(steps):
        seed_torch(settings.seed, "comparator", step)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * (1 + math.cos(math.pi * step / steps)) / 2
        data = task.batch_at("train", batch, step, seed=settings.seed, augment=True).to(worker.device)
        optimiser.zero_grad(set_to_none=True)
        loss = objective(step, data)
        if not bool(torch.isfinite(loss)):
            raise DivergedError(
                f"The loss is not finite at step {step + 1}. Use fewer steps or another seed.", field="steps"
            )
        loss.backward()
        optimiser.step()
        row = {"phase": "mark", "step": step + 1, "of": steps, "loss": float(loss.detach())}
        if (step + 1) % ROW_STEPS == 0 or step + 1 == steps:
            rows.append(row)
            worker.report(row, None)
        else:
            worker.show_progress(row)
    model.eval()
    marked = accuracies(model, task, worker, "marked")
    return SchemeResult(steps, steps * (batch + key_inputs), rows, clean | marked)


def accuracies(model: nn.Module, task: Task, worker: WorkerContext, name: str) -> dict[str, float]:
    """Return the metric of the test split as the measurement `primary_NAME`."""
    exact = EmbedSettings.of({"amp": False})
    return {f"primary_{name}": evaluate(model, task, "test", exact, worker)}


def unchanged_training(
    model: nn.Module, task: Task, worker: WorkerContext, change: Callable[[], None]
) -> SchemeResult:
    """Return the result of an embedding that takes no steps.

    Args:
        model: on the worker's device; ends in evaluation mode.
        task: primary task.
        worker: the only process.
        change: changes the model's weights.
    """
    model.to(worker.device).eval()
    clean = accuracies(model, task, worker, "clean")
    change()
    return SchemeResult(0, 0, [], clean | accuracies(model, task, worker, "marked"))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Use running statistics inside the block, so that key samples do not change them."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
