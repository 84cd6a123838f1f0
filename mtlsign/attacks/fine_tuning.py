"""Fine-tuning: last or all layers, from the stolen weights or with a new last layer, up to full retraining.

Names and epochs follow the Watermark-Robustness-Toolbox (`facts/attacks.md` §A): FTLL, FTAL with true labels,
RTLL, RTAL with the last layer drawn anew and the stolen model's labels.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    Batch,
    Epochs,
    LearningRate,
    NotApplicableError,
    seeded,
)
from mtlsign.attacks.training import Loss, Path, frozen_copy, train_sgd, trainable_copy
from mtlsign.tasks import Task


def ftal(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "quarter",
    epochs: Epochs = 5,
    path: Path = "constant",
    batch: Batch = 128,
) -> AttackOutcome:
    """All layers on true labels."""
    data = attacker_view(model, task, budget, seed)
    tuned = trainable_copy(model).train()
    return train_sgd(tuned, data, budget, seed, lr=budget.rate(lr), epochs=epochs, path=path, batch=batch)


def retrain(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "full",
    epochs: Epochs = 10,
    batch: Batch = 128,
) -> AttackOutcome:
    """Retrain everything from the stolen weights: the training rate falling to 0 along a cosine."""
    return ftal(model, task, budget, seed, lr=lr, epochs=epochs, path="cosine", batch=batch)


def ftll(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "quarter",
    epochs: Epochs = 5,
    batch: Batch = 128,
) -> AttackOutcome:
    """The last layer alone on true labels; the rest stays as it is."""
    data = attacker_view(model, task, budget, seed)
    tuned = trainable_copy(model)
    last = last_layer(tuned)
    return train_sgd(
        tuned,
        data,
        budget,
        seed,
        lr=budget.rate(lr),
        epochs=epochs,
        batch=batch,
        parameters=last.parameters(),
    )


def rtll(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "quarter",
    epochs: Epochs = 10,
    batch: Batch = 128,
) -> AttackOutcome:
    """A new last layer alone, on the stolen model's labels; batch norms drift along with the data."""
    data = attacker_view(model, task, budget, seed)
    tuned = _with_new_last_layer(model, seed).train()
    last = last_layer(tuned)
    return train_sgd(
        tuned, data, budget, seed, lr=budget.rate(lr), epochs=epochs, batch=batch,
        parameters=last.parameters(), loss=_stolen_labels(model),
    )  # fmt: skip


def rtal(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "quarter",
    epochs: Epochs = 5,
    batch: Batch = 128,
) -> AttackOutcome:
    """A new last layer, then all layers, on the stolen model's labels."""
    data = attacker_view(model, task, budget, seed)
    tuned = _with_new_last_layer(model, seed).train()
    return train_sgd(
        tuned, data, budget, seed, lr=budget.rate(lr), epochs=epochs, batch=batch, loss=_stolen_labels(model)
    )


def last_layer(model: nn.Module) -> nn.Linear:
    """The linear layer that holds the classes. Raises `NotApplicableError` for a model without one."""
    found = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not found:
        raise NotApplicableError("has no linear last layer; tune all layers instead (ftal)", field="model")
    return found[-1]


def _with_new_last_layer(model: nn.Module, seed: int) -> nn.Module:
    tuned = trainable_copy(model)
    last = last_layer(tuned)
    fresh = copy.deepcopy(last).cpu()
    with seeded("last layer", seed):
        fresh.reset_parameters()
    with torch.no_grad():
        for target, source in zip(last.parameters(), fresh.parameters(), strict=True):
            target.copy_(source)
    return tuned


def _stolen_labels(model: nn.Module) -> Loss:
    teacher = frozen_copy(model)

    def loss(tuned: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            said = teacher(x).argmax(1)
        return F.cross_entropy(tuned(x), said)

    return loss
