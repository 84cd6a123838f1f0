"""The training loops that attacks share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtlsign.attacks.base import AttackerResources, AttackOutcome, require_finite
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.losses import distillation_loss

Path = Literal["constant", "cosine"]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy to work on; the given model is never changed."""
    return copy.deepcopy(model).requires_grad_(True).eval()


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that stays: the stolen model as its own teacher."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def train_sgd(
    model: nn.Module,
    data: Task,
    budget: AttackerResources,
    seed: int,
    *,
    lr: float,
    epochs: int,
    path: Path = "constant",
    batch: int = 128,
    parameters: Iterable[nn.Parameter] | None = None,
    loss: Loss | None = None,
    after: Callable[[], None] = lambda: None,
) -> AttackOutcome:
    """SGD with momentum 0.9 and weight decay 5e-4 on the attacker's augmented data, in place.

    `model` is in the mode that the caller chose and ends in evaluation mode; `loss` defaults to the task's;
    `after` is called after every step. Little data are cut into at least eight batches an epoch, of eight
    images or more. Raises `AttackDivergedError`.
    """
    batch = min(batch, max(8, data.size("attacker") // 8))
    chosen = list(model.parameters() if parameters is None else parameters)
    optimizer = torch.optim.SGD(chosen, lr=lr, momentum=0.9, weight_decay=5e-4)
    per_epoch = data.steps("attacker", batch)
    step = images = 0
    for epoch in range(epochs):
        for x, y in data.batches("attacker", batch, epoch=epoch, seed=seed, augment=True):
            for group in optimizer.param_groups:
                done = step / (epochs * per_epoch)
                group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2 if path == "cosine" else lr
            optimizer.zero_grad(set_to_none=True)
            value = data.loss(model(x), y) if loss is None else loss(model, x, y)
            value.backward()
            optimizer.step()
            after()
            require_finite(value, step)
            step, images = step + 1, images + len(x)
            budget.tick(step, epochs * per_epoch)
    return AttackOutcome(model.eval(), step, images)


def attacker_batches(data: Task, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless augmented images of the attacker, [batch, C, H, W]."""
    step = 0
    while True:
        yield data.batch_at("attacker", batch, step, seed=seed, augment=True)[0]
        step += 1


def distillation_from_teacher(
    student: nn.Module, teacher: nn.Module, x: Tensor, temperature: float = 2.0
) -> Tensor:
    """Distillation from the stolen model's own outputs: how attackers without labels keep the task."""
    with torch.no_grad():
        wanted = teacher(x)
    return distillation_loss(student(x), wanted, temperature)


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, data: Task, batch: int = 256, most: int = 16) -> nn.Module:
    """Batch norms' running statistics anew from the attacker's plain images, at most `most` batches."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return model.eval()
    kept = [m.momentum for m in norms]
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain average over the batches
        m.train()
    for i, (x, _) in enumerate(data.batches("attacker", batch, shuffle=False)):
        if i == most:
            break
        if len(x) > 1:
            model(x)
    for m, momentum in zip(norms, kept, strict=True):
        m.momentum = momentum
    return model.eval()
