"""Fine-tuning by low-rank adaptation (LoRA, Hu et al. 2022): factors are trained, then merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    Epochs,
    LearningRate,
    NotApplicableError,
)
from mtlsign.attacks.training import train_supervised, trainable_copy
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator

Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class LowRankUpdate(nn.Module):
    """Parametrization W + scale·B·A of a frozen matrix W [out, in]; B is zero at the start."""

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the matrix with the product of its factors added, [out, in]."""
        updated: Tensor = weight + self.scale * (self.up @ self.down)
        return updated


def inner_linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers before the last one by name, in the order of the modules.

    Raises:
        NotApplicableError: there are none, as in a convolutional network.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inner = dict(list(layers.items())[:-1])
    if not inner:
        raise NotApplicableError(
            "The network has no linear layers before its outputs. The attack is one for transformers.",
            field="model",
        )
    return inner


def lora_tune(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    rank: Rank = 8,
    alpha: Alpha = 16.0,
    lr: LearningRate = 1e-3,
    epochs: Epochs = 3,
    batch: BatchSize = 32,
) -> AttackOutcome:
    """Train factors of `rank` at every linear layer but the last with Adam on true labels, and merge them.

    The update of a matrix is alpha/rank·B·A; all other parameters are frozen. A random A and B = 0 are the
    start, as in Hu et al. (2022).

    Raises:
        NotApplicableError: the network has no linear layers before its outputs.
    """
    data = attacker_view(model, task, resources, seed)
    tuned = trainable_copy(model).requires_grad_(False)
    layers = inner_linear_layers(tuned)
    generator = seeded_generator("mtlsign/attack/lora", seed)
    factors: list[nn.Parameter] = []
    for layer in layers.values():
        update = LowRankUpdate(layer.weight, min(rank, *layer.weight.shape), alpha / rank, generator)
        parametrize.register_parametrization(layer, "weight", update)
        factors += [update.down, update.up]
    outcome = train_supervised(
        tuned.train(), data, replace(resources, training_optimizer="adam"), seed,
        lr=resources.learning_rate(lr), epochs=epochs, batch=batch, parameters=factors,
    )  # fmt: skip
    for layer in layers.values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    merged = trainable_copy(model)  # parametrizations change the order of tensors in a state dict
    merged.load_state_dict(outcome.model.state_dict())
    return replace(outcome, model=merged)
