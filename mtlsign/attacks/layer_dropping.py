"""Removal of whole blocks of a transformer, as in depth pruning (Fan et al. 2020; Gromov et al. 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from mtlsign.attacks.attacker_data import attacker_sample, attacker_view
from mtlsign.attacks.base import AttackerResources, AttackOutcome, NotApplicableError
from mtlsign.attacks.training import trainable_copy
from mtlsign.models.attention_layers import attention_layers
from mtlsign.models.taps import last_layer
from mtlsign.models.transformer import Transformer
from mtlsign.tasks import Task

Count = Annotated[int, Field(ge=0, le=1000)]


def drop_layers(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    every: Count = 0,
    last: Count = 1,
) -> AttackOutcome:
    """Remove the last `last` blocks, and of all blocks every `every`-th (0: none). Nothing is trained.

    Blocks of a container get new numbers, as in a smaller network of the same kind.

    Raises:
        NotApplicableError: the network has no list of blocks with an attention layer each, no block or each
            block would go, or the remaining blocks do not fit together.
    """
    data = attacker_view(model, task, resources, seed)
    sample = attacker_sample(data, 2)
    attacked = trainable_copy(model)
    blocks = _blocks(attacked, sample)
    count = len(blocks)
    dropped = {number for number in range(count) if every and (number + 1) % every == 0}
    dropped |= set(range(max(0, count - last), count))
    if not dropped or len(dropped) == count:
        raise NotApplicableError(
            f"{len(dropped)} of {count} blocks would be removed. Choose other values of every and last.",
            field="drop_layers",
        )
    for number in sorted(dropped, reverse=True):
        container, index = blocks[number]
        del container[index]
    if isinstance(attacked, Transformer):
        attacked.shape = replace(attacked.shape, layers=count - len(dropped))
    try:
        with torch.no_grad():
            attacked(sample)
    except (RuntimeError, IndexError) as error:
        raise NotApplicableError(
            f"The remaining blocks do not fit together ({type(error).__name__}).", field="model"
        ) from None
    return AttackOutcome(attacked)


def _blocks(model: nn.Module, sample: torch.Tensor) -> list[tuple[nn.ModuleList | nn.Sequential, int]]:
    """Return the container and number of each block with one attention layer, in execution order."""
    attentions = attention_layers(model, (last_layer(model, sample),), sample)
    modules = dict(model.named_modules())
    blocks: list[tuple[nn.ModuleList | nn.Sequential, int]] = []
    for layer in attentions:
        parts = layer.module.split(".")
        for size in range(len(parts) - 1, 0, -1):
            container = modules[".".join(parts[: size - 1])]
            if isinstance(container, nn.ModuleList | nn.Sequential) and parts[size - 1].isdigit():
                blocks.append((container, int(parts[size - 1])))
                break
    if not blocks or len({(id(container), index) for container, index in blocks}) < len(attentions):
        raise NotApplicableError(
            "The network has no list of blocks with an attention layer each.", field="model"
        )
    return blocks
