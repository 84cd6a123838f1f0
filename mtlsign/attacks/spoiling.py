"""The spoil attack (paper, appendix B): key and head are known; the backbone is tuned to shuffled labels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from mtlsign.attacks.attacker_data import attackers
from mtlsign.attacks.base import (
    Attacked,
    Batch,
    Budget,
    NotApplicableError,
    Rate,
    Steps,
    Weight,
    device_of,
    require_finite,
)
from mtlsign.attacks.training import frozen, kept_task, primary, recalibrate, stolen_copy
from mtlsign.tasks import Task
from mtlsign.tasks.base import generator
from mtlsign.watermark.embedding.losses import watermark_loss


def spoil(
    model: nn.Module,
    task: Task,
    budget: Budget,
    seed: int,
    *,
    steps: Steps = 60,
    lr: Rate = 1e-3,
    distillation: Weight = 2.0,
    labels: Literal["random", "inverted"] = "random",
    batch: Batch = 128,
) -> Attacked:
    """Adam on the mark's loss with wrong labels, the head frozen, in the verifier's own graph; distillation
    from the stolen model on the attacker's images keeps the task. 1,000 images were used in science.md.
    """
    probe = budget.probe
    if probe is None:
        raise NotApplicableError("needs the owner's opened key; give the kit", field="spoil")
    data = attackers(model, task, budget, seed)
    batch = min(batch, data.size("attacker"))
    wrong = 1 - probe.labels.float()
    if labels == "random":
        gen = generator("mtlsign/attack/spoil", seed)
        wrong = torch.randint(2, (probe.spec.n,), generator=gen).float().to(wrong)
    teacher, spoiled = frozen(model), stolen_copy(model).train()
    parameters = dict(spoiled.named_parameters())
    optimizer = torch.optim.Adam(spoiled.parameters(), lr=budget.rate(lr))
    for step, x in zip(range(steps), primary(data, batch, seed), strict=False):
        optimizer.zero_grad(set_to_none=True)
        kernels = probe.graph.read({n: p.to(probe.device) for n, p in parameters.items()})
        loss = watermark_loss(probe.scores_of(kernels, differentiable=True), wrong)
        loss = loss.to(device_of(model))
        if distillation:
            loss = loss + distillation * kept_task(spoiled, teacher, x)
        loss.backward()
        optimizer.step()
        require_finite(loss, step)
        budget.tick(step + 1, steps)
    images = steps * (probe.spec.n + (batch if distillation else 0))
    return Attacked(recalibrate(spoiled, data), steps, images)
