"""Fine-tuning with other objectives, and small shifts of filters, after the Watermark-Robustness-Toolbox."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.attacks.attacker_data import attacker_view, require_images, require_logits
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    Epochs,
    Fraction,
    LearningRate,
    NotApplicableError,
)
from mtlsign.attacks.training import fine_tune, seeded_outputs, train_supervised, trainable_copy
from mtlsign.tasks import Batch, Task
from mtlsign.tasks.outputs import default_logits
from mtlsign.tasks.splitting import seeded_generator

Shift = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


def adversarial_training(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    epsilon: Fraction = 0.05,
    epochs: Epochs = 5,
    lr: LearningRate = "quarter",
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Fine-tune all layers on images and on their adversarial versions (fast gradient sign method).

    `epsilon` is the size of the step as a share of the range of pixel values in the batch.
    """
    require_images(task)
    require_logits(task)
    data = attacker_view(model, task, resources, seed)

    def loss(tuned: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        start = x.clone().requires_grad_(True)
        clean = data.loss(tuned(start), y)
        (gradient,) = torch.autograd.grad(clean, start, retain_graph=True)
        size = epsilon * float(x.max() - x.min())
        adversarial = (x + size * gradient.sign()).clamp(float(x.min()), float(x.max()))
        return (clean + data.loss(tuned(adversarial), y)) / 2

    return fine_tune(model, data, resources, seed, lr=lr, epochs=epochs, batch=batch, loss=loss)


def label_smoothing(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    smoothing: Fraction = 0.3,
    epochs: Epochs = 5,
    lr: LearningRate = "quarter",
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Fine-tune all layers on labels that share `smoothing` of their probability with all classes."""
    if task.targets != "labels":
        raise NotApplicableError("Only labels of classes can be smoothed. Use another attack.", field="task")
    data = attacker_view(model, task, resources, seed)

    def loss(tuned: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(default_logits(tuned(x)), y, label_smoothing=smoothing)

    return fine_tune(model, data, resources, seed, lr=lr, epochs=epochs, batch=batch, loss=loss)


def regularize(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    strength: Shift = 0.01,
    epochs: Epochs = 5,
    lr: LearningRate = "quarter",
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Fine-tune all layers with a large penalty, `strength` times the squared norm of the weights."""
    data, steps = attacker_view(model, task, resources, seed), itertools.count()

    def loss(tuned: nn.Module, x: Tensor, y: Any) -> Tensor:
        squares = [p.square().sum() for p in tuned.parameters() if p.dim() > 1]
        outputs = seeded_outputs(tuned, data, Batch(x, y), seed, next(steps))
        return data.loss(outputs, y) + strength * torch.stack(squares).sum()

    return fine_tune(model, data, resources, seed, lr=lr, epochs=epochs, batch=batch, loss=loss)


def shift_weights(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    shift: Shift = 1.0,
    noise: Shift = 0.1,
    epochs: Epochs = 2,
    lr: LearningRate = "quarter",
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Subtract `shift` times its layer's mean filter from each filter and add noise, then fine-tune.

    `noise` is in units of the layer's standard deviation.
    """
    data = attacker_view(model, task, resources, seed)
    shifted = trainable_copy(model).train()
    generator = seeded_generator("mtlsign/attack/shift_weights", seed)
    with torch.no_grad():
        for module in shifted.modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight
                draws = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise * weight.std() * draws - shift * weight.mean(0, keepdim=True))
    rate = resources.learning_rate(lr)
    return train_supervised(shifted, data, resources, seed, lr=rate, epochs=epochs, batch=batch)
