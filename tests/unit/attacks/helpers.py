"""Helpers of the attack tests: run one expression on a tiny model, and compare models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.attacks import AttackerResources, AttackOutcome, parse_attacks
from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.tasks import Task

Maker = Callable[..., nn.Module]
TRAINING_LR = 0.02


def run(text: str, model: nn.Module, task: Task, seed: int = 0, **resources: Any) -> AttackOutcome:
    (plan,) = parse_attacks(text)
    return plan.run(model, task, AttackerResources(**{"training_lr": TRAINING_LR, **resources}), seed)


def attacker_images(model: nn.Module, task: Task) -> Tensor:
    """All images of the attacker."""
    data = attacker_view(model, task, AttackerResources(), 0)
    (batch,) = data.batches("attacker", 256, shuffle=False)
    images: Tensor = batch.inputs
    return images


def changed_parameters(model: nn.Module, other: nn.Module) -> set[str]:
    original = dict(model.named_parameters())
    return {name for name, p in other.named_parameters() if not torch.equal(p, original[name])}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0))


def flat_network() -> nn.Module:
    """A network without batch norms, stages and channel groups; its last layer depends on positions."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 22 * 22, 4)).eval()
