"""Fine-tuning of the last layer or of all layers, up to retraining from the marked weights.

Names and epochs follow the Watermark-Robustness-Toolbox: FTLL and FTAL train on true labels. RTLL and RTAL
reinitialise the last layer and train on the marked model's predictions.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.attacks.attacker_data import attacker_view, require_logits
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    Epochs,
    LearningRate,
    NotApplicableError,
    seeded,
)
from mtlsign.attacks.training import (
    Loss,
    LrSchedule,
    fine_tune,
    frozen_copy,
    train_supervised,
    trainable_copy,
)
from mtlsign.tasks import Task
from mtlsign.tasks.outputs import default_logits


def ftal(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "quarter",
    epochs: Epochs = 5,
    schedule: LrSchedule = "constant",
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Fine-tune all layers on true labels."""
    data = attacker_view(model, task, resources, seed)
    return fine_tune(model, data, resources, seed, lr=lr, epochs=epochs, schedule=schedule, batch=batch)


def retrain(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "full",
    epochs: Epochs = 10,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Retrain all layers from the marked weights; the training rate falls to 0 along a cosine."""
    return ftal(model, task, resources, seed, lr=lr, epochs=epochs, schedule="cosine", batch=batch)


def ftll(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "quarter",
    epochs: Epochs = 5,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Fine-tune the last layer on true labels; other layers and batch norms are unchanged."""
    data = attacker_view(model, task, resources, seed)
    tuned = trainable_copy(model)
    return train_supervised(
        tuned, data, resources, seed, lr=resources.learning_rate(lr), epochs=epochs, batch=batch,
        parameters=last_layer(tuned).parameters(),
    )  # fmt: skip


def rtll(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "quarter",
    epochs: Epochs = 10,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Train a new last layer on the marked model's predictions; batch norms follow the attacker's data."""
    require_logits(task)
    data = attacker_view(model, task, resources, seed)
    tuned = _with_new_last_layer(model, seed).train()
    return train_supervised(
        tuned, data, resources, seed, lr=resources.learning_rate(lr), epochs=epochs, batch=batch,
        parameters=last_layer(tuned).parameters(), loss=_loss_on_predictions(model),
    )  # fmt: skip


def rtal(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "quarter",
    epochs: Epochs = 5,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Train a new last layer and all other layers on the marked model's predictions."""
    require_logits(task)
    data = attacker_view(model, task, resources, seed)
    tuned = _with_new_last_layer(model, seed).train()
    return train_supervised(
        tuned, data, resources, seed, lr=resources.learning_rate(lr), epochs=epochs, batch=batch,
        loss=_loss_on_predictions(model),
    )  # fmt: skip


def last_layer(model: nn.Module) -> nn.Linear:
    """Return the last linear layer, whose outputs are the classes.

    Raises:
        NotApplicableError: the model has no linear layer.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise NotApplicableError(
            "The model has no linear last layer. Fine-tune all layers instead (ftal).", field="model"
        )
    return layers[-1]


def _with_new_last_layer(model: nn.Module, seed: int) -> nn.Module:
    tuned = trainable_copy(model)
    last = last_layer(tuned)
    new_layer = copy.deepcopy(last).cpu()
    with seeded("last layer", seed):
        new_layer.reset_parameters()
    with torch.no_grad():
        for target, source in zip(last.parameters(), new_layer.parameters(), strict=True):
            target.copy_(source)
    return tuned


def _loss_on_predictions(model: nn.Module) -> Loss:
    """Return the cross-entropy against the marked model's predicted classes."""
    teacher = frozen_copy(model)

    def loss(tuned: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            predictions = default_logits(teacher(x)).argmax(1)
        return F.cross_entropy(default_logits(tuned(x)), predictions)

    return loss
