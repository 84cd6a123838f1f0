"""Pruning operations in place: the smallest weights or the least important channels become 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtlsign.attacks.attacker_data import attacker_sample
from mtlsign.attacks.base import NotApplicableError, device_of
from mtlsign.models.batch_norms import is_batch_norm
from mtlsign.models.channel_groups import batch_norm_of_conv
from mtlsign.tasks import Task

Rule = Literal["activity", "norm"]

#: Batches over which activity is measured, and their size.
ACTIVITY_BATCHES, ACTIVITY_BATCH = 8, 256


@torch.no_grad()
def prune_weights(model: nn.Module, ratio: float) -> None:
    """Set the smallest `ratio` of each weight tensor of two or more dimensions to 0."""
    for p in model.parameters():
        if p.dim() > 1:
            threshold = torch.kthvalue(p.abs().flatten(), max(1, int(ratio * p.numel()))).values
            p.mul_(p.abs() > threshold)


@torch.no_grad()
def prune_units(model: nn.Module, data: Task, ratio: float, by: Rule) -> None:
    """Set the least important channels of each convolution to 0, with gamma and beta of their batch norm.

    Args:
        model: changed in place.
        data: the attacker's view of the task.
        ratio: fraction of the channels.
        by: "norm" of the kernel rows, or mean "activity" of the batch norm (else of the convolution) on the
            attacker's images.

    Raises:
        NotApplicableError: the model has no convolution.
    """
    modules = dict(model.named_modules())
    convolutions = {n: m for n, m in modules.items() if isinstance(m, _ConvNd)}
    if not convolutions:
        raise NotApplicableError(
            "The model has no convolution. Prune weights instead (prune).", field="model"
        )
    norms = batch_norm_of_conv(model, attacker_sample(data))
    importance = {n: m.weight.flatten(1).norm(dim=1) for n, m in convolutions.items()}
    if by == "activity":
        importance = _activity(model, data, {norms.get(n, n): n for n in convolutions})
    for name, conv in convolutions.items():
        count = int(ratio * conv.weight.shape[0])
        least = torch.argsort(importance[name], stable=True)[:count]
        parts = [conv.weight, conv.bias]
        if name in norms:
            norm = modules[norms[name]]
            parts += [norm.weight, norm.bias]
        for part in parts:
            if part is not None:
                part[least] = 0.0


def _activity(model: nn.Module, data: Task, conv_of_module: dict[str, str]) -> dict[str, Tensor]:
    """Return the mean activity of each channel, by convolution."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def add(module: nn.Module, args: object, out: Tensor) -> None:
            # a ReLU after a batch norm removes negative values, so they are no activity
            active = out.clamp(min=0) if is_batch_norm(module) else out.abs()
            mean = active.detach().mean([d for d in range(out.dim()) if d != 1])
            sums[name] = sums.get(name, torch.zeros_like(mean)) + mean

        return add

    handles = [
        m.register_forward_hook(hook(conv_of_module[n]))
        for n, m in model.named_modules()
        if n in conv_of_module
    ]
    try:
        model.eval()
        for i, (x, _) in enumerate(data.batches("attacker", ACTIVITY_BATCH, shuffle=False)):
            if i == ACTIVITY_BATCHES:
                break
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return sums


@torch.no_grad()
def accuracy(model: nn.Module, data: Task) -> float:
    """Return the task's metric on the attacker's images without augmentation.

    The value is rounded to float32, so that comparisons with a threshold do not depend on float64 digits.
    """
    model.eval()
    metric = data.metric(device_of(model))
    for batch in data.batches("attacker", 500, shuffle=False):
        metric.update(data.predictions(model, batch), batch.targets)
    return float(torch.tensor(metric.value(), dtype=torch.float32))
