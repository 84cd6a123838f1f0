"""Reinitialisation of the first layers, which are then trained to give the marked model's features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn, no_grad

from mtlsign.attacks.attacker_data import attacker_sample, attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    LearningRate,
    LossWeight,
    NotApplicableError,
    Steps,
    seeded,
)
from mtlsign.attacks.training import (
    attacker_batches,
    frozen_copy,
    optimize,
    recalibrate_batch_norm,
    reset_parameters,
    trainable_copy,
)
from mtlsign.errors import ModelError
from mtlsign.models.architectures import default_taps
from mtlsign.models.taps import tapped_parameters
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.loop import one_cycle
from mtlsign.watermark.embedding.losses import distillation_loss

Stages = Annotated[int, Field(ge=1, le=3)]


def reinit_early_layers(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    stages: Stages = 1,
    steps: Steps = 300,
    lr: LearningRate = 5e-3,
    distillation: LossWeight = 1.0,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Reinitialise the stem and the first stages, then train them with Adam under a one-cycle schedule.

    The loss is the relative squared error of the last of these stages' features, plus `distillation` times
    KL(marked model || attacked model) through the unchanged layers. No trace of an early watermark remains.
    """
    data = attacker_view(model, task, resources, seed)
    batch = min(batch, data.size("attacker"))
    try:
        tap = default_taps(model, "free")[stages - 1]
    except ModelError as error:
        raise NotApplicableError(error.detail, field="reinit_early_layers") from None
    teacher, student = frozen_copy(model), trainable_copy(model)
    names = tapped_parameters(student, (tap,), attacker_sample(data))
    early = [student.get_submodule(name) for name in sorted({name.rpartition(".")[0] for name in names})]
    _reinitialise(early, seed)
    parameters = [p for module in early for p in module.parameters(recurse=False)]
    student.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    batches = attacker_batches(data, batch, seed)

    def loss_fn(step: int) -> Tensor:
        x = next(batches)
        with no_grad():
            target_features, target = _tap_and_output(teacher, x, tap)
        features, out = _tap_and_output(student, x, tap)
        loss = (features - target_features).square().mean() / target_features.var().clamp(min=1e-12)
        return loss + distillation * distillation_loss(out, target, 2.0)

    rate = resources.learning_rate(lr)
    optimize(loss_fn, parameters, steps, rate, resources, lr_at=partial(one_cycle, steps=steps, peak=rate))
    student.requires_grad_(True)
    return AttackOutcome(recalibrate_batch_norm(student, data), steps, steps * batch)


def _reinitialise(modules: Sequence[nn.Module], seed: int) -> None:
    """Draw new weights and switch to training mode."""
    with seeded("fresh", seed):
        for module in modules:
            reset_parameters(module)
            module.train()


def _tap_and_output(net: nn.Module, x: Tensor, tap: str) -> tuple[Tensor, Tensor]:
    outputs: list[Tensor] = []
    handle = net.get_submodule(tap).register_forward_hook(lambda module, args, out: outputs.append(out))
    try:
        out: Tensor = net(x)
    finally:
        handle.remove()
    return outputs[0], out
