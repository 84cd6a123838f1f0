"""Spoil attack (paper, appendix B): key and head are known; the network is trained on wrong labels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    LearningRate,
    LossWeight,
    NotApplicableError,
    Steps,
)
from mtlsign.attacks.training import (
    attacker_batches,
    distillation_from_teacher,
    frozen_copy,
    optimize,
    recalibrate_batch_norm,
    trainable_copy,
)
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator


def spoil(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    steps: Steps = 60,
    lr: LearningRate = 1e-3,
    distillation: LossWeight = 2.0,
    labels: Literal["random", "inverted"] = "random",
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Minimise the scheme's watermark loss on wrong labels with Adam; the head is frozen.

    Distillation from the marked model on the attacker's images preserves the task. Random labels match those
    of the key as often as an unmarked model does: one half of bits, one in so many classes of key samples.
    """
    scheme, key = resources.scheme, resources.key
    if key is None:
        raise NotApplicableError("The attack needs the owner's opened key. Give the kit.", field="spoil")
    data = attacker_view(model, task, resources, seed)
    batch = min(batch, data.size("attacker"))
    wrong = 1 - key.labels.float()
    if labels == "random":
        gen = seeded_generator("mtlsign/attack/spoil", seed)
        wrong = _random_labels(key.labels.float(), scheme.null_rate(key), gen)
    wrong_key, batches = key.with_labels(wrong), attacker_batches(data, batch, seed)
    teacher, attacked = frozen_copy(model), trainable_copy(model).train()

    def loss_fn(step: int) -> Tensor:
        x = next(batches)
        loss = scheme.watermark_loss(attacked, wrong_key)
        if loss is None:
            raise NotApplicableError(f"{scheme.name} has no differentiable watermark loss.", field="spoil")
        if distillation:
            loss = loss + distillation * distillation_from_teacher(attacked, teacher, x)
        return loss

    optimize(loss_fn, attacked.parameters(), steps, resources.learning_rate(lr), resources)
    images = steps * (key.sample_count + (batch if distillation else 0))
    return AttackOutcome(recalibrate_batch_norm(attacked, data), steps, images)


def _random_labels(labels: Tensor, null_rate: float, generator: torch.Generator) -> Tensor:
    """Return labels that match the key's with the probability of a match of an unmarked model."""
    if null_rate == 0.5:
        return torch.randint(2, (len(labels),), generator=generator).float().to(labels)
    matching = torch.rand(len(labels), generator=generator).to(labels.device) < null_rate
    return torch.where(matching, labels, 1 - labels)
