"""Collusion: the average of copies of one W0 that carry different marks (`facts/attacks.md` §F.11)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import AttackerResources, AttackOutcome, NotApplicableError
from mtlsign.attacks.pruning import Statistics
from mtlsign.attacks.training import recalibrate_batch_norm, trainable_copy
from mtlsign.tasks import Task

Copies = Annotated[int, Field(ge=0, le=1000)]


def average_models(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    copies: Copies = 0,
    bn: Statistics = "recalibrated",
) -> AttackOutcome:
    """The mean of the stolen model and the first `copies` others (0: all that there are)."""
    others = list(budget.copies)[: copies or None]
    if len(others) < max(1, copies):
        raise NotApplicableError(
            f"needs {max(1, copies)} other models marked from the same W0 and got {len(others)}; "
            "name them with --copies",
            field="average",
        )
    mean = trainable_copy(model)
    target = mean.state_dict()
    with torch.no_grad():
        for name, tensor in target.items():
            if not tensor.is_floating_point():
                continue
            for other in others:
                if name not in other or other[name].shape != tensor.shape:
                    raise NotApplicableError(
                        f"a copy has no fitting {name!r}; copies must be models of the same W0",
                        field="copies",
                    )
            stack = [tensor, *(other[name].to(tensor) for other in others)]
            tensor.copy_(torch.stack(stack).mean(0))
    if bn == "recalibrated":
        recalibrate_batch_norm(mean, attacker_view(model, task, budget, seed))
    return AttackOutcome(mean.eval())
