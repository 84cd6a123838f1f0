"""Weights rounded to a few bits, symmetric, one scale per output channel, and brought back to float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtlsign.attacks.base import AttackerResources, AttackOutcome
from mtlsign.attacks.training import trainable_copy
from mtlsign.tasks import Task


def int8(model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> AttackOutcome:
    """Eight bits: −127 … 127."""
    return _quantised(model, 8)


def int4(model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> AttackOutcome:
    """Four bits: −7 … 7."""
    return _quantised(model, 4)


def _quantised(model: nn.Module, bits: int) -> AttackOutcome:
    rounded = trainable_copy(model)
    with torch.no_grad():
        for p in rounded.parameters():
            if p.dim() > 1:
                p.copy_(quantise(p, bits))
    return AttackOutcome(rounded)


def quantise(weight: Tensor, bits: int) -> Tensor:
    """Each row of weight [O, …] at the nearest of 2^bits − 1 levels between ∓ its largest magnitude."""
    top = 2 ** (bits - 1) - 1
    rows = weight.flatten(1)
    scale = rows.abs().amax(1, keepdim=True) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((rows / scale).round().clamp(-top, top) * scale).reshape(weight.shape)
