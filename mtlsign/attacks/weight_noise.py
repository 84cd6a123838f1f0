"""Additive Gaussian noise on every weight tensor."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import AttackerResources, AttackOutcome
from mtlsign.attacks.pruning import Statistics
from mtlsign.attacks.training import recalibrate_batch_norm, trainable_copy
from mtlsign.tasks import Task
from mtlsign.tasks.base import seeded_generator

Sigma = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]


def noise(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    sigma: Sigma = 0.2,
    bn: Statistics = "kept",
) -> AttackOutcome:
    """`sigma` times each weight tensor's own standard deviation; batch norms' vectors stay."""
    gen, noisy = seeded_generator("mtlsign/attack/noise", seed), trainable_copy(model)
    with torch.no_grad():
        for p in noisy.parameters():
            if p.dim() > 1:
                p.add_(torch.randn(p.shape, generator=gen).to(p) * (sigma * p.std()))
    if bn == "recalibrated":
        recalibrate_batch_norm(noisy, attacker_view(model, task, budget, seed))
    return AttackOutcome(noisy)
