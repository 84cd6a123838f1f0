"""Quantisation: weights rounded to a few bits, symmetric, with one scale per output channel, in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtlsign.attacks.base import AttackerResources, AttackOutcome
from mtlsign.attacks.training import trainable_copy
from mtlsign.tasks import Task


def int8(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Round weights to 8 bits: -127 to 127."""
    return _quantised(model, 8)


def int4(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Round weights to 4 bits: -7 to 7."""
    return _quantised(model, 4)


def _quantised(model: nn.Module, bits: int) -> AttackOutcome:
    rounded = trainable_copy(model)
    with torch.no_grad():
        for p in rounded.parameters():
            if p.dim() > 1:
                p.copy_(quantise(p, bits))
    return AttackOutcome(rounded)


def quantise(weight: Tensor, bits: int) -> Tensor:
    """Round each row of a weight [O, ...] to 2^bits - 1 levels between minus and plus its largest value."""
    top = 2 ** (bits - 1) - 1
    rows = weight.flatten(1)
    scale = rows.abs().amax(1, keepdim=True) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((rows / scale).round().clamp(-top, top) * scale).reshape(weight.shape)
