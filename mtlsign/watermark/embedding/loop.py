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
from mtlsign.watermark.embedding.worker import WorkerContext

Number = TypeVar("Number", int, float)


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, split: str, settings: EmbedSettings, worker: WorkerContext
) -> float:
    """Mean of the task's metric over a split, in evaluation mode, shared out over the ranks."""
    was = [(m, m.training) for m in model.modules()]
    model.to(worker.device).to(memory_format=torch.channels_last).eval()
    sums = torch.zeros(2, dtype=torch.float64, device=worker.device)
    batches = task.batches(
        split, 500, epoch=0, seed=0, rank=worker.rank, world=worker.world_size, shuffle=False
    )
    for x, y in to_device(worker.device, batches):
        with mixed_precision(settings, worker.device):
            out = model(x)
        hits = task.correct(out.float() if isinstance(out, Tensor) else out, y)
        sums += torch.tensor(
            [float(hits.sum()), float(hits.numel())], dtype=torch.float64, device=worker.device
        )
    worker.all_reduce_sum([sums])
    for module, mode in was:
        module.training = mode
    return float(sums[0] / sums[1].clamp(min=1))


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate by the step alone: cosine from peak/25 up over the first 30 %, then down to nearly 0."""
    rise = max(1, round(0.3 * steps))
    if step < rise:
        return peak * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rise)) / 2)
    return peak * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2)


def wrap_ddp(model: nn.Module, worker: WorkerContext) -> nn.Module:
    """The network as DDP wraps it, where there is more than one rank."""
    if worker.world_size == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[worker.device] if worker.device.type == "cuda" else None
    )


def with_strides_of(parameter: Tensor, other: Tensor) -> Tensor:
    """`other` with the parameter's strides: torch's fused Adam pairs memory, not elements (docs/results.md)."""
    if other.stride() == parameter.stride() or other.dim() == 0:
        return other
    return torch.empty_like(parameter).copy_(other)


def use_batch_statistics(model: nn.Module, on: bool, momentum: float | None = None) -> None:
    """Batch norms use (and follow) the batch at hand, or their running statistics again."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(on)
            if momentum is not None:
                module.momentum = momentum


def average_buffers(model: nn.Module, worker: WorkerContext) -> None:
    """Running statistics as the mean over ranks: each has seen its share of the same epoch."""
    if worker.world_size > 1:
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        worker.all_reduce_sum(buffers)
        for buffer in buffers:
            buffer /= worker.world_size


def mixed_precision(settings: EmbedSettings, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on GPUs where the settings want it."""
    return torch.autocast("cuda", torch.bfloat16) if settings.amp and device.type == "cuda" else nullcontext()


def to_device(
    device: torch.device, batches: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, moved."""
    for x, y in batches:
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def seed_from(*parts: object) -> int:
    """A seed from SHA-256 of `parts`, 56 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def seed_torch(*parts: object) -> None:
    """Seed torch's generators from `parts`."""
    torch.manual_seed(seed_from(*parts))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group, times its `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


def require_set(value: Number | None) -> Number:
    """A setting that `resolved()` has filled in."""
    assert value is not None, "call settings.resolved() first"
    return value
