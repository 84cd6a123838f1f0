"""Fine-tuning of a detector with the recipe that detection libraries have by default.

The stem and the first stage of the body are frozen, and so are all batch norms. The marked layers that are
frozen keep their part of the watermark unchanged.
"""

from __future__ import annotations

from torch import nn

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
from mtlsign.models.detectors import BODY, body_of, body_stages
from mtlsign.tasks import Task


def fine_tune_detector(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    lr: LearningRate = "quarter",
    epochs: Epochs = 5,
    batch: BatchSize = 8,
) -> AttackOutcome:
    """Fine-tune a detector without its stem, first stage and batch norms."""
    if body_of(model) is None or not body_stages(model):
        raise NotApplicableError("The network is no detector. Use ftal.", field="model")
    data = attacker_view(model, task, resources, seed)
    tuned = trainable_copy(model)
    frozen = _frozen_parameters(tuned)
    trained = [parameter for name, parameter in tuned.named_parameters() if name not in frozen]
    return train_supervised(
        tuned, data, resources, seed, lr=resources.learning_rate(lr), epochs=epochs, batch=batch,
        parameters=trained,
    )  # fmt: skip


def _frozen_parameters(detector: nn.Module) -> set[str]:
    """Return the parameters of the body up to the end of its first stage, and those of one dimension."""
    first = body_stages(detector)[0]
    names = [name for name, _ in detector.named_parameters() if name.startswith(f"{BODY}.")]
    end = max((index for index, name in enumerate(names) if name.startswith(f"{first}.")), default=-1)
    vectors = {name for name in names if detector.get_parameter(name).dim() == 1}
    return {*names[: end + 1], *vectors}
