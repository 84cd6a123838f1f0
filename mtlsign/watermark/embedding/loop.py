"""Parts shared by all training loops: learning rates, evaluation over ranks, seeds, batch norm, means."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mtlsign.config.embed import EmbedSettings
from mtlsign.models.memory_format import memory_format_for
from mtlsign.tasks import Batch, Task
from mtlsign.tasks.metrics import Metric
from mtlsign.watermark.embedding.sharding import gathered
from mtlsign.watermark.embedding.worker import WorkerContext

Value = TypeVar("Value")


def evaluate(
    model: nn.Module, task: Task, split: str, settings: EmbedSettings, worker: WorkerContext
) -> float:
    """Return the value of `evaluated_metric`."""
    return evaluated_metric(model, task, split, settings, worker).value()


@torch.no_grad()
def evaluated_metric(
    model: nn.Module, task: Task, split: str, settings: EmbedSettings, worker: WorkerContext
) -> Metric:
    """Evaluate the task's metric on a split, in evaluation mode.

    Args:
        model: the network; its modes are restored afterwards.
        task: the primary task.
        split: name of the split.
        settings: decides on mixed precision.
        worker: the ranks divide the split among them.

    Returns:
        The metric over the whole split, equal on all ranks.
    """
    modes = [(module, module.training) for module in model.modules()]
    if not isinstance(model, FSDPModule):
        model.to(worker.device).to(memory_format=memory_format_for(model))
    model.eval()
    metric = task.metric(worker.device)
    batches = task.batches(
        split,
        task.evaluation_batch,
        epoch=0,
        seed=0,
        rank=worker.rank,
        world=worker.world_size,
        shuffle=False,
    )
    with gathered(model):
        for batch in to_device(worker.device, batches):
            with mixed_precision(settings, worker.device):
                out = task.predictions(model, batch)
            metric.update(out.float() if isinstance(out, Tensor) else out, batch.targets)
    worker.all_reduce_sum([metric.state])
    for module, mode in modes:
        module.training = mode
    return metric


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Compute a learning rate from the step alone.

    It rises by a cosine from peak/25 during the first 30 % of the steps, then falls to nearly 0.

    Args:
        step: number of the step, from 0.
        steps: steps of the whole schedule.
        peak: highest learning rate.
    """
    rise = max(1, round(0.3 * steps))
    if step < rise:
        return peak * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rise)) / 2)
    return peak * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2)


def wrap_ddp(model: nn.Module, worker: WorkerContext) -> nn.Module:
    """Wrap the network in DistributedDataParallel if there is more than one rank."""
    if worker.world_size == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[worker.device] if worker.device.type == "cuda" else None
    )


def with_strides_of(parameter: Tensor, other: Tensor) -> Tensor:
    """Return `other` with the parameter's strides.

    Fused Adam pairs memory, not elements, so that different strides would mix up the elements.
    """
    if other.stride() == parameter.stride() or other.dim() == 0:
        return other
    return torch.empty_like(parameter).copy_(other)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers by name; the γ of a frozen batch norm is a buffer."""
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def use_batch_statistics(model: nn.Module, on: bool, momentum: float | None = None) -> None:
    """Set whether batch norms use (and follow) the statistics of the batch or their running statistics.

    Args:
        model: the network.
        on: True for the statistics of the batch.
        momentum: new momentum of the running statistics; None leaves it unchanged.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(on)
            if momentum is not None:
                module.momentum = momentum


def average_buffers(model: nn.Module, worker: WorkerContext) -> None:
    """Replace running statistics by their mean over ranks, because each rank has seen a part of the data."""
    if worker.world_size > 1:
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        worker.all_reduce_sum(buffers)
        for buffer in buffers:
            buffer /= worker.world_size


def mixed_precision(settings: EmbedSettings, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for bf16 on GPUs if the settings enable it."""
    return torch.autocast("cuda", torch.bfloat16) if settings.amp and device.type == "cuda" else nullcontext()


def to_device(device: torch.device, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches on `device`."""
    for batch in batches:
        yield batch.to(device)


def seed_from(*parts: object) -> int:
    """Derive a seed of 56 bits from SHA-256 of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def seed_torch(*parts: object) -> None:
    """Seed torch's generators from `parts`."""
    torch.manual_seed(seed_from(*parts))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, multiplied by its `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


def require_set(value: Value | None) -> Value:
    """Return a setting that `EmbedSettings.with_defaults` has filled in."""
    assert value is not None, "call settings.with_defaults() first"
    return value


class RunningMeans:
    """Means of named values since the last reset, summed in float64.

    Args:
        names: names of the values.
        device: where the sums are stored.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = tuple(names)
        #: For each name the sum and the count: float64 [2 · names].
        self.sums = torch.zeros(2 * len(self._names), dtype=torch.float64, device=device)

    def add(self, name: str, value: Tensor) -> None:
        """Add one value, a tensor without dimensions."""
        position = 2 * self._names.index(name)
        self.sums[position] += value.detach().double()
        self.sums[position + 1] += 1

    def means(self) -> dict[str, float]:
        """Return the means of all names with at least one value."""
        pairs = self.sums.reshape(-1, 2).tolist()
        return {name: total / count for name, (total, count) in zip(self._names, pairs, strict=True) if count}

    def reset(self) -> None:
        """Forget all values."""
        self.sums.zero_()
