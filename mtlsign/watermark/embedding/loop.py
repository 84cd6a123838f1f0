"""What every training loop here needs: rates by the step alone, evaluation over ranks, seeds, batch norm."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mtlsign.config.embed import EmbedSettings
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.worker import Rank

Number = TypeVar("Number", int, float)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, split: str, s: EmbedSettings, rank: Rank) -> float:
    """Mean of the task's metric over a split, in evaluation mode, shared out over the ranks."""
    was = [(m, m.training) for m in model.modules()]
    model.to(rank.device).to(memory_format=torch.channels_last).eval()
    sums = torch.zeros(2, dtype=torch.float64, device=rank.device)
    batches = task.batches(split, 500, epoch=0, seed=0, rank=rank.index, world=rank.world, shuffle=False)
    for x, y in on_device(rank.device, batches):
        with mixed_precision(s, rank.device):
            out = model(x)
        hits = task.correct(out.float() if isinstance(out, Tensor) else out, y)
        sums += torch.tensor(
            [float(hits.sum()), float(hits.numel())], dtype=torch.float64, device=rank.device
        )
    rank.sum([sums])
    for module, mode in was:
        module.training = mode
    return float(sums[0] / sums[1].clamp(min=1))


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate by the step alone: cosine from peak/25 up over the first 30 %, then down to nearly 0."""
    rise = max(1, round(0.3 * steps))
    if step < rise:
        return peak * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rise)) / 2)
    return peak * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2)


def distributed(model: nn.Module, rank: Rank) -> nn.Module:
    """The network as DDP wraps it, where there is more than one rank."""
    if rank.world == 1:
        return model
    return DistributedDataParallel(model, device_ids=[rank.device] if rank.device.type == "cuda" else None)


def laid_out_as(parameter: Tensor, other: Tensor) -> Tensor:
    """`other` with the parameter's strides: torch's fused Adam pairs memory, not elements (docs/log.md)."""
    if other.stride() == parameter.stride() or other.dim() == 0:
        return other
    return torch.empty_like(parameter).copy_(other)


def normalise_by_batch(model: nn.Module, on: bool, momentum: float | None = None) -> None:
    """Batch norms use (and follow) the batch at hand, or their running statistics again."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(on)
            if momentum is not None:
                module.momentum = momentum


def average_buffers(model: nn.Module, rank: Rank) -> None:
    """Running statistics as the mean over ranks: each has seen its share of the same epoch."""
    if rank.world > 1:
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        rank.sum(buffers)
        for buffer in buffers:
            buffer /= rank.world


def mixed_precision(s: EmbedSettings, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on GPUs where the settings want it."""
    return torch.autocast("cuda", torch.bfloat16) if s.amp and device.type == "cuda" else nullcontext()


def on_device(
    device: torch.device, batches: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, moved."""
    for x, y in batches:
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def number_of(*parts: object) -> int:
    """A seed from SHA-256 of `parts`, 56 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def reseed(*parts: object) -> None:
    """Seed torch's generators from `parts`."""
    torch.manual_seed(number_of(*parts))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group, times its `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


def known(value: Number | None) -> Number:
    """A setting that `resolved()` has filled in."""
    assert value is not None, "call settings.resolved() first"
    return value
