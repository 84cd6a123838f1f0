"""Tuning of all weights by distillation from the marked model, and training from random weights.

Both use the attacker's images, their labels and the outputs of the marked model, but no key.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    Epochs,
    LearningRate,
    LossWeight,
    NotApplicableError,
    Steps,
    seeded,
)
from mtlsign.attacks.training import frozen_copy, optimize, reset_parameters, seeded_outputs, trainable_copy
from mtlsign.tasks import Batch, Task
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.watermark.embedding.loop import one_cycle
from mtlsign.watermark.embedding.losses import task_distillation

#: Batches from which the Fisher information is estimated.
_FISHER_BATCHES = 16

Decay = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Averaging = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Radius = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Mixing = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class Tuning:
    """Settings of a training by distillation, with a one-cycle schedule.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate.
        distillation: weight of KL(marked || attacked).
        labels: weight of the primary loss.
        weight_decay: of the optimiser.
        ema_decay: decay of the moving average of the weights; 0 for none.
        mixup: largest share of the second image; 0 for none.
        sam_radius: size of the adversarial weight perturbation, relative to each tensor; 0 for none.
        ewc: weight of elastic weight consolidation; 0 for none.
        batch: batch size.
        adam: whether the optimiser is Adam instead of SGD with momentum 0.9.
    """

    steps: int
    lr: float
    distillation: float = 1.0
    labels: float = 1.0
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    mixup: float = 0.0
    sam_radius: float = 0.0
    ewc: float = 0.0
    batch: int = 128
    adam: bool = True

    def optimizer(self) -> Callable[..., torch.optim.Optimizer]:
        """Return the optimiser's class with its settings."""
        if self.adam:
            return partial(torch.optim.Adam, weight_decay=self.weight_decay)
        return partial(torch.optim.SGD, momentum=0.9, weight_decay=self.weight_decay)


def tune(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    steps: Steps = 500,
    lr: LearningRate = 1e-2,
    distillation: LossWeight = 1.0,
    labels: LossWeight = 1.0,
    weight_decay: Decay = 0.0,
    ema_decay: Averaging = 0.0,
    mixup: Mixing = 0.0,
    sam_radius: Radius = 0.0,
    ewc: LossWeight = 0.0,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Train all weights with Adam under a one-cycle schedule, with batch norms in training mode.

    `ema_decay` is that of an exponential moving average of the weights. `mixup` mixes pairs of images;
    `labels` is the weight of their loss. `sam_radius` computes gradients at an adversarial perturbation of
    this relative size, as SAM does. `ewc` is the weight of elastic weight consolidation, as in REFIT.
    """
    data = attacker_view(model, task, resources, seed)
    tuning = Tuning(
        steps, resources.learning_rate(lr), distillation=distillation, labels=labels, batch=batch,
        weight_decay=weight_decay, ema_decay=ema_decay, mixup=mixup, sam_radius=sam_radius, ewc=ewc,
    )  # fmt: skip
    return tune_by_distillation(trainable_copy(model), model, data, resources, seed, tuning)


def relearn(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    epochs: Epochs = 20,
    lr: LearningRate = "full",
    start: Literal["random", "shrink_perturb"] = "random",
    optimizer: Literal["training", "adam"] = "training",
    weight_decay: Decay = 0.0,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Train the whole network from random weights on the marked model's outputs and the labels.

    The optimizer is that of the model's training, SGD with its weight decay or Adam without any; or it is
    Adam with `weight_decay`, as in `tune`, so that both can be compared.
    `shrink_perturb` starts from 0.4 times the stolen weights plus half a random initialisation.

    Raises:
        NotApplicableError: a weight decay is given, and the optimizer is SGD.
    """
    adam = "adam" in (optimizer, resources.training_optimizer)
    if weight_decay and not adam:
        raise NotApplicableError(
            "SGD has the weight decay of the model's training. Add optimizer=adam.", field="weight_decay"
        )
    data = attacker_view(model, task, resources, seed)
    student = trainable_copy(model)
    reset_weights(student, seed)
    if start == "shrink_perturb":
        with torch.no_grad():
            for parameter, stolen in zip(student.parameters(), model.parameters(), strict=True):
                if parameter.dim() > 1:
                    parameter.mul_(0.5).add_(stolen, alpha=0.4)
    size = min(batch, data.size("attacker"))
    steps = epochs * max(1, data.size("attacker") // size)
    tuning = Tuning(
        steps, resources.learning_rate(lr), batch=size, weight_decay=weight_decay if adam else 5e-4, adam=adam
    )
    return tune_by_distillation(student, model, data, resources, seed, tuning)


def reset_weights(model: nn.Module, seed: int) -> None:
    """Draw all weights at random; word vectors stay, because they are public or in the stolen file."""
    with seeded("relearn", seed):
        for module in model.modules():
            if not isinstance(module, nn.Embedding):
                reset_parameters(module)


def tune_by_distillation(
    attacked: nn.Module,
    teacher: nn.Module,
    data: Task,
    resources: AttackerResources,
    seed: int,
    tuning: Tuning,
) -> AttackOutcome:
    """Train `attacked` in place.

    Args:
        attacked: start of the training.
        teacher: the marked model.
        data: the attacker's view of the task.
        resources: for progress.
        seed: order of the data.
        tuning: settings of the training.
    """
    teacher, batch = frozen_copy(teacher), min(tuning.batch, data.size("attacker"))
    attacked.train()
    named = dict(attacked.named_parameters())
    averaged = copy.deepcopy(attacked) if tuning.ema_decay else None
    gen = seeded_generator("mtlsign/attack/tune", seed)
    consolidation = _Consolidation(attacked, data, batch, seed) if tuning.ewc else None

    def batch_loss(outputs: Any, own: Batch) -> Tensor:
        loss = torch.zeros((), device=own.inputs.device)
        if tuning.distillation:
            with torch.no_grad():
                target = data.training_outputs(teacher, own)
            loss = loss + tuning.distillation * task_distillation(data, outputs, target, 2.0)
        return loss + tuning.labels * data.loss(outputs, own.targets) if tuning.labels else loss

    def loss_fn(step: int) -> Tensor:
        own = data.batch_at("attacker", batch, step, seed=seed, augment=True)
        if tuning.mixup:
            own = Batch(_mixed(own, tuning.mixup, gen), own.targets)
        loss = batch_loss(seeded_outputs(attacked, data, own, seed, step), own)
        if tuning.sam_radius:
            _require_tensor_targets(own, "sam_radius")
            shifted = _ascended(named, loss, tuning.sam_radius)
            loss = batch_loss(functional_call(attacked, shifted, (own.inputs,)), own)
        return loss if consolidation is None else loss + tuning.ewc * consolidation(named)

    def after_step() -> None:
        if averaged is not None:
            _move_average(averaged, attacked, tuning.ema_decay)

    optimize(
        loss_fn, named.values(), tuning.steps, tuning.lr, resources, optimizer_class=tuning.optimizer(),
        lr_at=partial(one_cycle, steps=tuning.steps, peak=tuning.lr), after_step=after_step,
    )  # fmt: skip
    result = attacked if averaged is None else averaged
    return AttackOutcome(result.requires_grad_(True).eval(), tuning.steps, tuning.steps * batch)


def _mixed(batch: Batch, largest: float, generator: torch.Generator) -> Tensor:
    """Return each image mixed with another one of the batch, of which at most a share `largest` is taken."""
    x: Tensor = batch.inputs
    _require_tensor_targets(batch, "mixup")
    if not x.is_floating_point():
        raise NotApplicableError("Token ids cannot be mixed. Leave out mixup.", field="mixup")
    share = largest * float(torch.rand((), generator=generator))
    return (1 - share) * x + share * x[torch.randperm(len(x), generator=generator).to(x.device)]


def _require_tensor_targets(batch: Batch, field: str) -> None:
    """Raise `NotApplicableError` for a detector's targets."""
    if not isinstance(batch.targets, Tensor):
        raise NotApplicableError(f"A detector cannot be tuned so. Leave out {field}.", field=field)


def _ascended(parameters: Mapping[str, Tensor], loss: Tensor, size: float) -> dict[str, Tensor]:
    """Return parameters moved along the gradient by `size` times each tensor's norm."""
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {
        name: p + (size * p.detach().norm() / gradient.norm().clamp(min=1e-12)) * gradient
        for (name, p), gradient in zip(parameters.items(), gradients, strict=True)
    }


class _Consolidation:
    """Elastic weight consolidation: squared changes of the weights, weighted by the Fisher information."""

    def __init__(self, model: nn.Module, data: Task, batch: int, seed: int) -> None:
        self._anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._information = {name: torch.zeros_like(p) for name, p in self._anchor.items()}
        for step in range(_FISHER_BATCHES):
            own = data.batch_at("attacker", batch, step, seed=seed + 1)
            loss = data.loss(seeded_outputs(model, data, own, seed, step), own.targets)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for total, gradient in zip(self._information.values(), gradients, strict=True):
                total += gradient.square() / _FISHER_BATCHES
        largest = max(float(total.max()) for total in self._information.values())
        for total in self._information.values():
            total /= max(largest, 1e-30)

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of the current parameters."""
        penalties = [
            (self._information[name] * (parameter - self._anchor[name]).square()).sum()
            for name, parameter in parameters.items()
        ]
        return torch.stack(penalties).sum()


@torch.no_grad()
def _move_average(averaged: nn.Module, current: nn.Module, decay: float) -> None:
    for mean, value in zip(averaged.state_dict().values(), current.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)
