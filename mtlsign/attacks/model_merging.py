"""Merging of the marked model with another fine-tune, and removal of its change from a public base model."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    Epochs,
    LearningRate,
    NotApplicableError,
)
from mtlsign.attacks.training import fine_tune, recalibrate_batch_norm, trainable_copy
from mtlsign.tasks import Task

#: Weight of the other model, or of its change from the start.
Weight = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
#: Factor, or share of entries or singular values, that remains of a change.
Remaining = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


def merge_models(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    mode: Literal["average", "arithmetic"] = "average",
    start: Literal["copy", "base"] = "copy",
    weight: Weight = 0.5,
    lr: LearningRate = "full",
    epochs: Epochs = 3,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Merge the marked weights W with another fine-tune V that the attacker makes of its data.

    V starts from the stolen weights or, with `start=base`, from the public base (`--public-base`); tensors
    that the base does not have are the stolen ones. `average` returns (1 - weight)·W + weight·V, and
    `arithmetic` W + weight·(V - start), as in Ilharco et al. (2023). From the stolen copy both are equal.

    Raises:
        NotApplicableError: `start=base` without a public base that fits the network.
    """
    data = attacker_view(model, task, resources, seed)
    origin = trainable_copy(model)
    if start == "base":
        base = _fitting_base(model, resources)
        origin.load_state_dict(base, strict=False)
    outcome = fine_tune(origin, data, resources, seed, lr=lr, epochs=epochs, batch=batch)
    merged, other, first = trainable_copy(model), outcome.model.state_dict(), origin.state_dict()
    with torch.no_grad():
        for name, tensor in merged.state_dict().items():
            if not tensor.is_floating_point():
                continue
            change = other[name] - (tensor if mode == "average" else first[name])
            tensor.add_(change, alpha=weight)
    recalibrate_batch_norm(merged, data)
    return AttackOutcome(merged.eval(), outcome.steps, outcome.images)


def subtract_public_base(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    mode: Literal["scale", "prune", "low_rank"] = "scale",
    keep: Remaining = 0.5,
) -> AttackOutcome:
    """Reduce the change W - B of the marked weights from a public base B (`--public-base`).

    `scale` multiplies the change with `keep`. `prune` keeps the `keep` largest of the change's entries in
    each tensor. `low_rank` keeps a share `keep` of the singular values of each matrix's change. Tensors that
    the base does not have stay as they are, such as new outputs. With 0 the base remains.

    Raises:
        NotApplicableError: there is no public base, or it does not fit the network.
    """
    base = _fitting_base(model, resources)
    attacked = trainable_copy(model)
    with torch.no_grad():
        for name, tensor in attacked.state_dict().items():
            if name in base and tensor.is_floating_point():
                origin = base[name].to(tensor)
                tensor.copy_(origin + _reduced(tensor - origin, mode, keep))
    return AttackOutcome(recalibrate_batch_norm(attacked, attacker_view(model, task, resources, seed)))


def _reduced(change: Tensor, mode: str, keep: float) -> Tensor:
    """Return what remains of a change [...]."""
    if mode == "scale" or keep == 0:
        return change * keep
    if mode == "prune":
        count = round((1 - keep) * change.numel())
        if not count:
            return change
        threshold = change.abs().flatten().kthvalue(count).values
        return change * (change.abs() > threshold)
    if change.dim() < 2:
        return change
    left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    rank = max(1, int(keep * len(values)))
    reduced: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return reduced.reshape(change.shape)


def _fitting_base(model: nn.Module, resources: AttackerResources) -> dict[str, Tensor]:
    """Return the tensors of the public base that the network has in the same shape."""
    if resources.public_base is None:
        raise NotApplicableError(
            "The attack needs a public base. Name it with --public-base.", field="public-base"
        )
    state = model.state_dict()
    base = {
        name: tensor.to(state[name])
        for name, tensor in resources.public_base.items()
        if name in state and state[name].shape == tensor.shape
    }
    matrices = [name for name, tensor in state.items() if tensor.dim() > 1]
    if 2 * sum(name in base for name in matrices) < len(matrices):
        raise NotApplicableError(
            "The public base has less than half of the network's matrices. Give the base of this model.",
            field="public-base",
        )
    return base
