"""Model extraction: a network with random weights learns the marked model's answers alone, without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.attacks.attacker_data import attacker_view, require_images, require_logits
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    Epochs,
    LearningRate,
    device_of,
    seeded,
)
from mtlsign.attacks.distilled_tuning import reset_weights
from mtlsign.attacks.training import Loss, frozen_copy, train_supervised, trainable_copy
from mtlsign.models.input_spec import ImageSpec
from mtlsign.tasks import Task
from mtlsign.tasks.outputs import default_logits
from mtlsign.watermark.embedding.losses import distillation_loss

Answers = Literal["probabilities", "classes"]
Queries = Literal["images", "mixtures"]


def extract(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    epochs: Epochs = 20,
    answers: Answers = "probabilities",
    queries: Queries = "images",
    network: Literal["same", "small"] = "same",
    lr: LearningRate = "full",
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Train a network from random weights on the marked model's answers to the attacker's images.

    Answers are probabilities (distillation) or predicted classes (retraining). Queries are images of the
    task, or mixtures of two turned images, as a substitute for other images (knockoff). The network is of
    the same architecture or a small one of two convolutions (cross-architecture).
    """
    require_logits(task)
    data = attacker_view(model, task, resources, seed)
    if network == "small" or queries == "mixtures":
        require_images(task)
    with seeded("extract", seed):
        student = trainable_copy(model) if network == "same" else _small_network(task).to(device_of(model))
    if network == "same":
        reset_weights(student, seed)
    return train_supervised(
        student.train(), data, resources, seed, lr=resources.learning_rate(lr), epochs=epochs,
        schedule="cosine", batch=batch, loss=_loss_on_answers(model, answers, _query_maker(queries, seed)),
    )  # fmt: skip


def _small_network(task: Task) -> nn.Module:
    spec = task.input_spec
    assert isinstance(spec, ImageSpec)
    return nn.Sequential(
        *(nn.Conv2d(spec.channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, task.classes)),
    )


def _query_maker(queries: Queries, seed: int) -> Callable[[Tensor], Tensor]:
    """Return the function that makes queries of the attacker's images."""
    if queries == "images":
        return lambda x: x
    generator = torch.Generator().manual_seed(seed)

    def mixtures(x: Tensor) -> Tensor:
        share = torch.rand(len(x), 1, 1, 1, generator=generator).to(x)
        order = torch.randperm(len(x), generator=generator).to(x.device)
        return share * x.flip(2) + (1 - share) * x[order].flip(3)

    return mixtures


def _loss_on_answers(model: nn.Module, answers: Answers, make_queries: Callable[[Tensor], Tensor]) -> Loss:
    teacher = frozen_copy(model)

    def loss(student: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        queries = make_queries(x)
        with torch.no_grad():
            target = default_logits(teacher(queries))
        outputs = default_logits(student(queries))
        count = outputs.shape[1]
        if answers == "classes":
            return F.cross_entropy(outputs, target.argmax(1).clamp(max=count - 1))
        return distillation_loss(outputs, target[:, :count], 2.0)

    return loss
