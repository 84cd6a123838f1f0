"""Training loops and copies of models that attacks share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    LearningRate,
    require_finite,
    seeded,
)
from mtlsign.tasks import Batch, Task
from mtlsign.watermark.embedding.losses import distillation_loss

LrSchedule = Literal["constant", "cosine"]
#: (model, inputs, targets) -> loss.
Loss = Callable[[nn.Module, Tensor, Any], Tensor]
_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4),
    "adam": torch.optim.Adam,
}


def trainable_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode with trainable parameters."""
    return copy.deepcopy(model).requires_grad_(True).eval()


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode without gradients, such as a teacher."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def optimize(
    loss_fn: Callable[[int], Tensor],
    parameters: Iterable[Tensor],
    steps: int,
    lr: float,
    resources: AttackerResources,
    *,
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    lr_at: Callable[[int], float] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Minimise a loss and report progress.

    Args:
        loss_fn: step -> loss.
        parameters: tensors to optimise.
        steps: number of steps.
        lr: learning rate.
        resources: their `on_step` is called after each step.
        optimizer_class: called with the parameters and `lr`.
        lr_at: step -> learning rate, instead of a constant one.
        after_step: called after each step of the optimiser.

    Raises:
        AttackDivergedError: a loss is not finite.
    """
    optimizer = optimizer_class(list(parameters), lr=lr)
    for step in range(steps):
        if lr_at is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(step)
        loss.backward()
        optimizer.step()
        after_step()
        require_finite(loss, step)
        resources.on_step(step + 1, steps)


def train_supervised(
    model: nn.Module,
    data: Task,
    resources: AttackerResources,
    seed: int,
    *,
    lr: float,
    epochs: int,
    schedule: LrSchedule = "constant",
    batch: int = 128,
    parameters: Iterable[nn.Parameter] | None = None,
    loss: Loss | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> AttackOutcome:
    """Train on the attacker's augmented data with the optimizer of the model's training, in place.

    SGD has momentum 0.9 and weight decay 5e-4; Adam has neither.

    Args:
        model: in the mode that the caller chose; it ends in evaluation mode.
        data: the attacker's view of the task.
        resources: optimizer, and progress.
        seed: order and augmentation of the data.
        lr: peak learning rate.
        epochs: passes over the attacker's data.
        schedule: constant, or falling to 0 along a cosine.
        batch: batch size. Few data are divided into at least eight batches of at least eight images.
        parameters: parameters to train; all by default.
        loss: the task's loss by default.
        after_step: called after each step of the optimiser.

    Raises:
        AttackDivergedError: a loss is not finite.
    """
    batch = min(batch, max(8, data.size("attacker") // 8))
    steps = epochs * data.steps("attacker", batch)
    batches = (
        own
        for epoch in range(epochs)
        for own in data.batches("attacker", batch, epoch=epoch, seed=seed, augment=True)
    )
    images = 0

    def loss_fn(step: int) -> Tensor:
        nonlocal images
        own = next(batches)
        images += len(own)
        if loss is not None:
            return loss(model, own.inputs, own.targets)
        return data.loss(seeded_outputs(model, data, own, seed, step), own.targets)

    def cosine(step: int) -> float:
        return lr * (1 + math.cos(math.pi * (step / steps))) / 2

    optimize(
        loss_fn, model.parameters() if parameters is None else parameters, steps, lr, resources,
        optimizer_class=_OPTIMIZERS[resources.training_optimizer],
        lr_at=cosine if schedule == "cosine" else None, after_step=after_step,
    )  # fmt: skip
    return AttackOutcome(model.eval(), steps, images)


def fine_tune(
    model: nn.Module,
    data: Task,
    resources: AttackerResources,
    seed: int,
    *,
    lr: LearningRate,
    epochs: int,
    batch: int,
    schedule: LrSchedule = "constant",
    loss: Loss | None = None,
) -> AttackOutcome:
    """Train all layers of a copy of the model, in training mode; see `train_supervised`."""
    return train_supervised(
        trainable_copy(model).train(), data, resources, seed, lr=resources.learning_rate(lr), epochs=epochs,
        schedule=schedule, batch=batch, loss=loss,
    )  # fmt: skip


def seeded_outputs(model: nn.Module, data: Task, batch: Batch, seed: int, step: int) -> Any:
    """Return `Task.training_outputs`; the boxes that a detector draws follow from seed and step.

    Args:
        model: the network.
        data: the attacker's view of the task.
        batch: of this step.
        seed: seed of the attack.
        step: number of the step.
    """
    if isinstance(batch.targets, Tensor):
        return data.training_outputs(model, batch)
    with seeded("boxes", seed, step):
        return data.training_outputs(model, batch)


def attacker_batches(data: Task, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield augmented images of the attacker without end: [batch, C, H, W]."""
    step = 0
    while True:
        yield data.batch_at("attacker", batch, step, seed=seed, augment=True).inputs
        step += 1


def distillation_from_teacher(
    student: nn.Module, teacher: nn.Module, x: Tensor, temperature: float = 2.0
) -> Tensor:
    """Return the distillation loss from the marked model, with which attackers preserve the task.

    Args:
        student: the attacked model.
        teacher: the marked model.
        x: images [n, C, H, W]; labels are not needed.
        temperature: of both softmax functions.
    """
    with torch.no_grad():
        target = teacher(x)
    return distillation_loss(student(x), target, temperature)


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module, data: Task, batch: int = 256, max_batches: int = 16
) -> nn.Module:
    """Recompute the running statistics of batch norms from the attacker's images, in place.

    Args:
        model: returned in evaluation mode.
        data: the attacker's view of the task; images are not augmented.
        batch: batch size.
        max_batches: number of batches at most.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return model.eval()
    momenta = [m.momentum for m in norms]
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain average over the batches
        m.train()
    for i, (x, _) in enumerate(data.batches("attacker", batch, shuffle=False)):
        if i == max_batches:
            break
        if len(x) > 1:
            model(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()


@torch.no_grad()
def reset_parameters(module: nn.Module) -> None:
    """Draw a module's parameters at random, without those of its submodules, in place.

    Parameters of a module without `reset_parameters`, such as the tokens and positions of a vision
    transformer, get usual initial values. A vector or scalar becomes 1 if its mean is nearer to 1 than to 0,
    as a gain, and 0 otherwise. Tensors of more dimensions get a normal distribution with a standard
    deviation of .02, as in ViT (arXiv 2010.11929) and Swin (arXiv 2103.14030).
    """
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    else:
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                parameter.fill_(float(parameter.double().mean() > 0.5))
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
