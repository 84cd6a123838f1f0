"""Pruning by weight magnitude and by channel, at one ratio or as far as the task bears it, without and with
fine-tuning after (fine-pruning, FP).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    Batch,
    Epochs,
    Fraction,
    LearningRate,
    NotApplicableError,
)
from mtlsign.attacks.training import recalibrate_batch_norm, train_sgd, trainable_copy
from mtlsign.models.channel_groups import batch_norm_of_conv
from mtlsign.models.taps import batch_norm_types
from mtlsign.tasks import Task

Points = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Statistics = Literal["kept", "recalibrated"]
Rule = Literal["activity", "norm"]
Units = Literal["weights", "channels"]

#: Ratios that `prune_until` tries, in turn.
PATH = tuple(round(0.05 * i, 2) for i in range(1, 20))


def prune(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    ratio: Fraction = 0.5,
    bn: Statistics = "kept",
) -> AttackOutcome:
    """Each weight tensor's smallest magnitudes set to 0; batch norm statistics kept or taken anew."""
    pruned = trainable_copy(model)
    prune_weights(pruned, ratio)
    if bn == "recalibrated":
        recalibrate_batch_norm(pruned, attacker_view(model, task, budget, seed))
    return AttackOutcome(pruned)


def prune_channels(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    ratio: Fraction = 0.3,
    by: Rule = "activity",
    bn: Statistics = "kept",
) -> AttackOutcome:
    """In each convolution the channels least active on clean data (or of the least norm) set to 0."""
    data = attacker_view(model, task, budget, seed)
    pruned = trainable_copy(model)
    prune_units(pruned, data, ratio, by)
    if bn == "recalibrated":
        recalibrate_batch_norm(pruned, data)
    return AttackOutcome(pruned)


def prune_to_accuracy_drop(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    points: Points = 10.0,
    units: Units = "weights",
    bn: Statistics = "kept",
) -> AttackOutcome:
    """The highest ratio of a path of 5 % steps at which the attacker's own data show a loss of ≤ `points`."""
    data = attacker_view(model, task, budget, seed)
    best, before = trainable_copy(model), accuracy(model, data)
    for ratio in PATH:
        pruned = trainable_copy(model)
        if units == "weights":
            prune_weights(pruned, ratio)
        else:
            prune_units(pruned, data, ratio, "activity")
        if bn == "recalibrated":
            recalibrate_batch_norm(pruned, data)
        if 100 * (before - accuracy(pruned, data)) > points:
            break
        best = pruned
    return AttackOutcome(best)


def fine_prune(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    ratio: Fraction = 0.5,
    lr: LearningRate = "quarter",
    epochs: Epochs = 3,
    batch: Batch = 128,
) -> AttackOutcome:
    """Prune weights, then tune the rest; what is pruned stays 0."""
    return _then_tune(model, task, budget, seed, lambda m, _: prune_weights(m, ratio), lr, epochs, batch)


def fine_prune_channels(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    ratio: Fraction = 0.3,
    by: Rule = "activity",
    lr: LearningRate = "quarter",
    epochs: Epochs = 3,
    batch: Batch = 128,
) -> AttackOutcome:
    """Prune channels, then tune the rest; what is pruned stays 0."""
    return _then_tune(model, task, budget, seed, lambda m, d: prune_units(m, d, ratio, by), lr, epochs, batch)


def _then_tune(
    model: nn.Module, task: Task, budget: AttackerResources, seed: int, cut: Callable[[nn.Module, Task], None],
    lr: float | str, epochs: int, batch: int,
) -> AttackOutcome:  # fmt: skip
    data = attacker_view(model, task, budget, seed)
    pruned = trainable_copy(model)
    before = dict(model.named_parameters())
    cut(pruned, data)
    # Weights that were 0 before were pruned before; a bias or γ may be 0 of itself.
    holes = [(p, (p == 0) & ((before[n] != 0) | (p.dim() > 1))) for n, p in pruned.named_parameters()]
    holes = [(p, hole) for p, hole in holes if bool(hole.any())]

    def keep_holes() -> None:
        with torch.no_grad():
            for p, hole in holes:
                p.masked_fill_(hole, 0.0)

    pruned.train()
    return train_sgd(
        pruned, data, budget, seed, lr=budget.rate(lr), epochs=epochs, batch=batch, after=keep_holes
    )


@torch.no_grad()
def prune_weights(model: nn.Module, ratio: float) -> None:
    """Set the smallest `ratio` of each weight tensor of two or more dimensions to 0."""
    for p in model.parameters():
        if p.dim() > 1:
            cut = torch.kthvalue(p.abs().flatten(), max(1, int(ratio * p.numel()))).values
            p.mul_(p.abs() > cut)


@torch.no_grad()
def prune_units(model: nn.Module, data: Task, ratio: float, by: Rule) -> None:
    """Set kernel rows, and γ and β of the batch norm behind them, to 0 for the least important channels.

    Activity is the mean |output| of the batch norm (or of the convolution) over the attacker's images.
    """
    modules = dict(model.named_modules())
    convolutions = {n: m for n, m in modules.items() if isinstance(m, _ConvNd)}
    if not convolutions:
        raise NotApplicableError("has no convolution; prune weights instead (prune)", field="model")
    norms = batch_norm_of_conv(model, data.splits["attacker"].batch(torch.arange(1))[0])
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


def _activity(model: nn.Module, data: Task, where: dict[str, str]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def add(module: nn.Module, args: object, out: Tensor) -> None:
            # what a ReLU behind a batch norm lets through is what counts as activity
            active = out.clamp(min=0) if isinstance(module, batch_norm_types()) else out.abs()
            mean = active.detach().mean([d for d in range(out.dim()) if d != 1])
            sums[name] = sums.get(name, torch.zeros_like(mean)) + mean

        return add

    handles = [m.register_forward_hook(hook(where[n])) for n, m in model.named_modules() if n in where]
    try:
        model.eval()
        for i, (x, _) in enumerate(data.batches("attacker", 256, shuffle=False)):
            if i == 8:
                break
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return sums


@torch.no_grad()
def accuracy(model: nn.Module, data: Task) -> float:
    """The task's metric on the attacker's plain data: all that he can measure."""
    model.eval()
    hits = torch.cat([data.correct(model(x), y) for x, y in data.batches("attacker", 500, shuffle=False)])
    return float(hits.mean())
