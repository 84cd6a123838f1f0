"""Additive Gaussian noise on all weight tensors."""

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
from mtlsign.tasks.splitting import seeded_generator

Sigma = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]


def noise(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    sigma: Sigma = 0.2,
    bn: Statistics = "kept",
) -> AttackOutcome:
    """Add noise of `sigma` times each weight tensor's standard deviation; vectors are unchanged."""
    gen, noisy = seeded_generator("mtlsign/attack/noise", seed), trainable_copy(model)
    with torch.no_grad():
        for p in noisy.parameters():
            if p.dim() > 1:
                p.add_(torch.randn(p.shape, generator=gen).to(p) * (sigma * p.std()))
    if bn == "recalibrated":
        recalibrate_batch_norm(noisy, attacker_view(model, task, resources, seed))
    return AttackOutcome(noisy)
