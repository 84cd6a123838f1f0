"""Attacks on black-box watermarks: unlearned triggers, preprocessed queries, removed outputs."""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.attacks.attacker_data import attacker_view, require_images, require_logits
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    Epochs,
    LearningRate,
    NotApplicableError,
    Preprocessing,
    Steps,
)
from mtlsign.attacks.fine_tuning import last_layer
from mtlsign.attacks.training import fine_tune, frozen_copy, trainable_copy
from mtlsign.tasks import Task
from mtlsign.tasks.outputs import default_logits

#: Images from which triggers are reconstructed, and classes of which triggers are unlearned.
_IMAGES = 128
_SPARSITY = 0.01

Strength = Annotated[int, Field(ge=1, le=64)]


def neural_cleanse(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    steps: Steps = 30,
    epochs: Epochs = 3,
    lr: LearningRate = "quarter",
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Reconstruct the smallest trigger of each class, and unlearn the smallest of all by fine-tuning.

    A trigger is a mask and a pattern; `steps` of Adam fit them on the attacker's images. A fifth of every
    batch then carries the trigger under its true label.
    """
    require_images(task)
    require_logits(task)
    data = attacker_view(model, task, resources, seed)
    count = min(_IMAGES, data.size("attacker"))
    images = data.splits["attacker"].batch(torch.arange(count)).inputs
    triggers = [_reconstruct(model, images, target, steps) for target in range(task.classes)]
    mask, pattern = min(triggers, key=lambda trigger: float(trigger[0].sum()))

    def loss(tuned: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        part = max(1, len(x) // 5)
        stamped = torch.cat([x[:part] * (1 - mask) + pattern * mask, x[part:]])
        return data.loss(tuned(stamped), y)

    outcome = fine_tune(model, data, resources, seed, lr=lr, epochs=epochs, batch=batch, loss=loss)
    searched = task.classes * steps
    return AttackOutcome(outcome.model, outcome.steps + searched, outcome.images + searched * count)


def _reconstruct(model: nn.Module, images: Tensor, target: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return mask [1, 1, H, W] and pattern [1, C, H, W] that turn images into a class."""
    attacked = frozen_copy(model)
    low, high = float(images.min()), float(images.max())
    mask_logit = torch.zeros_like(images[:1, :1]).requires_grad_(True)
    pattern_logit = torch.zeros_like(images[:1]).requires_grad_(True)
    optimizer = torch.optim.Adam([mask_logit, pattern_logit], lr=0.2)
    classes = torch.full((len(images),), target, device=images.device)
    for _ in range(steps):
        mask, pattern = mask_logit.sigmoid(), pattern_logit.sigmoid() * (high - low) + low
        logits = default_logits(attacked(images * (1 - mask) + pattern * mask))
        loss = F.cross_entropy(logits, classes) + _SPARSITY * mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    pattern = pattern_logit.detach().sigmoid() * (high - low) + low
    return mask_logit.detach().sigmoid(), pattern


def preprocess_input(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    kind: Literal["smoothed", "quantised"] = "smoothed",
    strength: Strength = 3,
) -> AttackOutcome:
    """Preprocess every query and leave the weights unchanged.

    `smoothed` averages over squares of `strength` pixels; `quantised` leaves so many levels of brightness.
    """
    require_images(task)
    if strength < 2:
        raise NotApplicableError("A strength below 2 changes no image. Use 2 or more.", field="strength")
    return AttackOutcome(model, input_transforms=(Preprocessing(kind, strength),))


def remove_outputs(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Remove outputs of the last layer that belong to no class of the task."""
    layer = last_layer(model)
    if layer.out_features <= task.classes:
        raise NotApplicableError("The model has no output besides the task's classes.", field="model")
    attacked = trainable_copy(model)
    name = next(name for name, module in attacked.named_modules() if module is last_layer(attacked))
    reduced = copy.deepcopy(last_layer(attacked))
    reduced.out_features = task.classes
    reduced.weight = nn.Parameter(reduced.weight.detach()[: task.classes].clone())
    if reduced.bias is not None:
        reduced.bias = nn.Parameter(reduced.bias.detach()[: task.classes].clone())
    parent, _, attribute = name.rpartition(".")
    setattr(attacked.get_submodule(parent), attribute, reduced)
    return AttackOutcome(attacked)
