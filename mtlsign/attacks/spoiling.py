"""The spoil attack (paper, appendix B): key and head are known; the backbone is tuned to shuffled labels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    Batch,
    LearningRate,
    LossWeight,
    NotApplicableError,
    Steps,
    device_of,
    require_finite,
)
from mtlsign.attacks.training import (
    attacker_batches,
    distillation_from_teacher,
    frozen_copy,
    recalibrate_batch_norm,
    trainable_copy,
)
from mtlsign.tasks import Task
from mtlsign.tasks.base import seeded_generator
from mtlsign.watermark.embedding.losses import watermark_loss


def spoil(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    steps: Steps = 60,
    lr: LearningRate = 1e-3,
    distillation: LossWeight = 2.0,
    labels: Literal["random", "inverted"] = "random",
    batch: Batch = 128,
) -> AttackOutcome:
    """Adam on the mark's loss with wrong labels, the head frozen, in the verifier's own graph; distillation
    from the stolen model on the attacker's images keeps the task. 1,000 images were used in science.md.
    """
    detector = budget.detector
    if detector is None:
        raise NotApplicableError("needs the owner's opened key; give the kit", field="spoil")
    data = attacker_view(model, task, budget, seed)
    batch = min(batch, data.size("attacker"))
    wrong = 1 - detector.labels.float()
    if labels == "random":
        gen = seeded_generator("mtlsign/attack/spoil", seed)
        wrong = torch.randint(2, (detector.spec.n,), generator=gen).float().to(wrong)
    teacher, spoiled = frozen_copy(model), trainable_copy(model).train()
    parameters = dict(spoiled.named_parameters())
    optimizer = torch.optim.Adam(spoiled.parameters(), lr=budget.rate(lr))
    for step, x in zip(range(steps), attacker_batches(data, batch, seed), strict=False):
        optimizer.zero_grad(set_to_none=True)
        kernels = detector.graph.read({n: p.to(detector.device) for n, p in parameters.items()})
        loss = watermark_loss(detector.score_kernels(kernels, differentiable=True), wrong)
        loss = loss.to(device_of(model))
        if distillation:
            loss = loss + distillation * distillation_from_teacher(spoiled, teacher, x)
        loss.backward()
        optimizer.step()
        require_finite(loss, step)
        budget.tick(step + 1, steps)
    images = steps * (detector.spec.n + (batch if distillation else 0))
    return AttackOutcome(recalibrate_batch_norm(spoiled, data), steps, images)
