"""Additive Gaussian noise on every weight tensor."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from mtlsign.attacks.attacker_data import attackers
from mtlsign.attacks.base import Attacked, Budget
from mtlsign.attacks.pruning import Statistics
from mtlsign.attacks.training import recalibrate, stolen_copy
from mtlsign.tasks import Task
from mtlsign.tasks.base import generator

Sigma = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]


def noise(
    model: nn.Module, task: Task, budget: Budget, seed: int, *, sigma: Sigma = 0.2, bn: Statistics = "kept"
) -> Attacked:
    """`sigma` times each weight tensor's own standard deviation; batch norms' vectors stay."""
    gen, noisy = generator("mtlsign/attack/noise", seed), stolen_copy(model)
    with torch.no_grad():
        for p in noisy.parameters():
            if p.dim() > 1:
                p.add_(torch.randn(p.shape, generator=gen).to(p) * (sigma * p.std()))
    if bn == "recalibrated":
        recalibrate(noisy, attackers(model, task, budget, seed))
    return Attacked(noisy)
