"""Pruning of weights, and of channels or units, alone or followed by fine-tuning (fine-pruning)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    Epochs,
    Fraction,
    LearningRate,
)
from mtlsign.attacks.pruning_masks import Rule, accuracy, prune_units, prune_weights
from mtlsign.attacks.training import recalibrate_batch_norm, train_supervised, trainable_copy
from mtlsign.tasks import Task

Points = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
#: Running statistics of batch norms after a change of the weights.
Statistics = Literal["kept", "recalibrated"]
Units = Literal["weights", "channels"]

#: Ratios that `prune_to_accuracy_drop` tries in this order.
RATIOS = tuple(round(0.05 * i, 2) for i in range(1, 20))


def prune(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    ratio: Fraction = 0.5,
    bn: Statistics = "kept",
) -> AttackOutcome:
    """Set the smallest weights of each tensor to 0."""
    pruned = trainable_copy(model)
    prune_weights(pruned, ratio)
    if bn == "recalibrated":
        recalibrate_batch_norm(pruned, attacker_view(model, task, resources, seed))
    return AttackOutcome(pruned)


def prune_channels(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    ratio: Fraction = 0.3,
    by: Rule = "activity",
    bn: Statistics = "kept",
) -> AttackOutcome:
    """Set the least active (or smallest) channels of each convolution and units of each LSTM or GRU to 0."""
    data = attacker_view(model, task, resources, seed)
    pruned = trainable_copy(model)
    prune_units(pruned, data, ratio, by)
    if bn == "recalibrated":
        recalibrate_batch_norm(pruned, data)
    return AttackOutcome(pruned)


def prune_to_accuracy_drop(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    points: Points = 10.0,
    units: Units = "weights",
    bn: Statistics = "kept",
) -> AttackOutcome:
    """Prune at the highest of `RATIOS` before the attacker's data show a loss of more than `points`."""
    data = attacker_view(model, task, resources, seed)
    best, before = trainable_copy(model), accuracy(model, data)
    for ratio in RATIOS:
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
    resources: AttackerResources,
    seed: int,
    *,
    ratio: Fraction = 0.5,
    lr: LearningRate = "quarter",
    epochs: Epochs = 3,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Prune weights, then fine-tune the others; pruned weights stay 0."""
    return _prune_and_tune(
        model, task, resources, seed, lambda m, _: prune_weights(m, ratio), lr, epochs, batch
    )


def fine_prune_channels(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    ratio: Fraction = 0.3,
    by: Rule = "activity",
    lr: LearningRate = "quarter",
    epochs: Epochs = 3,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Prune channels or units, then fine-tune the others; pruned ones stay 0."""
    return _prune_and_tune(
        model, task, resources, seed, lambda m, d: prune_units(m, d, ratio, by), lr, epochs, batch
    )


def _prune_and_tune(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int,
    prune_in_place: Callable[[nn.Module, Task], None], lr: float | str, epochs: int, batch: int,
) -> AttackOutcome:  # fmt: skip
    data = attacker_view(model, task, resources, seed)
    pruned = trainable_copy(model)
    before = dict(model.named_parameters())
    prune_in_place(pruned, data)
    # A weight of 0 counts as pruned, a bias or gamma only if it has become 0, because it can be 0 before.
    masks = [(p, (p == 0) & ((before[n] != 0) | (p.dim() > 1))) for n, p in pruned.named_parameters()]
    masks = [(p, mask) for p, mask in masks if bool(mask.any())]

    def restore_zeros() -> None:
        with torch.no_grad():
            for p, mask in masks:
                p.masked_fill_(mask, 0.0)

    pruned.train()
    rate = resources.learning_rate(lr)
    return train_supervised(
        pruned, data, resources, seed, lr=rate, epochs=epochs, batch=batch, after_step=restore_zeros
    )
