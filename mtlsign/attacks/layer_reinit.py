"""Fresh early layers: re-drawn and trained to give the stolen model's features (`facts/attacks.md` §F.10)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    Batch,
    LearningRate,
    LossWeight,
    NotApplicableError,
    Steps,
    require_finite,
    seeded,
)
from mtlsign.attacks.training import attacker_batches, frozen_copy, recalibrate_batch_norm, trainable_copy
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
    budget: AttackerResources,
    seed: int,
    *,
    stages: Stages = 1,
    steps: Steps = 300,
    lr: LearningRate = 5e-3,
    distillation: LossWeight = 1.0,
    batch: Batch = 128,
) -> AttackOutcome:
    """Stem to stage `stages` drawn anew, then Adam (one-cycle) on the relative squared error of that stage's
    features and on KL(stolen ‖ net) through the untouched rest. No trace of an early mark can remain.
    """
    data = attacker_view(model, task, budget, seed)
    batch = min(batch, data.size("attacker"))
    try:
        tap = default_taps(model, "free")[stages - 1]
    except ModelError as error:
        raise NotApplicableError(str(error), field="fresh_early") from None
    teacher, student = frozen_copy(model), trainable_copy(model)
    sample = data.splits["attacker"].batch(torch.arange(1))[0]
    owners = {name.rpartition(".")[0] for name in tapped_parameters(student, (tap,), sample)}
    early = [student.get_submodule(name) for name in sorted(owners)]
    with seeded("fresh", seed):
        for module in early:
            draw = getattr(module, "reset_parameters", None)
            if not callable(draw):
                raise NotApplicableError(
                    f"{type(module).__name__} cannot be drawn anew; its weights are no layer's", field="model"
                )
            draw()
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            module.train()
    chosen = [p for module in early for p in module.parameters(recurse=False)]
    student.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(chosen, lr=budget.rate(lr))
    for step, x in zip(range(steps), attacker_batches(data, batch, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, budget.rate(lr))
        with torch.no_grad():
            wanted, said = _tap_and_output(teacher, x, tap)
        optimizer.zero_grad(set_to_none=True)
        found, out = _tap_and_output(student, x, tap)
        loss = (found - wanted).square().mean() / wanted.var().clamp(min=1e-12)
        loss = loss + distillation * distillation_loss(out, said, 2.0)
        loss.backward()
        optimizer.step()
        require_finite(loss, step)
        budget.tick(step + 1, steps)
    return AttackOutcome(recalibrate_batch_norm(student.requires_grad_(True), data), steps, steps * batch)


def _tap_and_output(net: nn.Module, x: Tensor, tap: str) -> tuple[Tensor, Tensor]:
    kept: list[Tensor] = []
    handle = net.get_submodule(tap).register_forward_hook(lambda module, args, out: kept.append(out))
    try:
        out: Tensor = net(x)
    finally:
        handle.remove()
    return kept[0], out
