"""Collusion: the mean of models that were marked with different keys from the same W0."""

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
    resources: AttackerResources,
    seed: int,
    *,
    copies: Copies = 0,
    bn: Statistics = "recalibrated",
) -> AttackOutcome:
    """Average the marked model with the first `copies` other models (0: with all of them)."""
    others = list(resources.other_models)[: copies or None]
    if len(others) < max(1, copies):
        raise NotApplicableError(
            f"The attack needs {max(1, copies)} other models marked from the same W0, not {len(others)}. "
            "Name them with --other-marked-models.",
            field="average_models",
        )
    mean = trainable_copy(model)
    with torch.no_grad():
        for name, tensor in mean.state_dict().items():
            if not tensor.is_floating_point():
                continue
            for other in others:
                if name not in other or other[name].shape != tensor.shape:
                    raise NotApplicableError(
                        f"A model has no tensor {name!r} of the marked model's shape. "
                        "Give models that were marked from the same W0.",
                        field="other-marked-models",
                    )
            stack = [tensor, *(other[name].to(tensor) for other in others)]
            tensor.copy_(torch.stack(stack).mean(0))
    if bn == "recalibrated":
        recalibrate_batch_norm(mean, attacker_view(model, task, resources, seed))
    return AttackOutcome(mean.eval())
