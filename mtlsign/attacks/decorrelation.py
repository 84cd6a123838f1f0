"""Carrier decorrelation: without the key, remove the correlation of features over random carrier inputs.

This is the main removal attack to report (docs/attacks.md).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mtlsign.attacks.attacker_data import attacker_view, require_logits
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    BatchSize,
    LearningRate,
    LossWeight,
    NotApplicableError,
    Steps,
    device_of,
)
from mtlsign.attacks.training import (
    attacker_batches,
    distillation_from_teacher,
    frozen_copy,
    optimize,
    recalibrate_batch_norm,
    trainable_copy,
)
from mtlsign.errors import ModelError
from mtlsign.models.architectures import default_taps
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.watermark.carriers import registry as carriers
from mtlsign.watermark.embedding.losses import correlation_loss
from mtlsign.watermark.keys.opening import watermark_integers
from mtlsign.watermark.verification.conv_model import ConvVerifierModel
from mtlsign.watermark.verification.model import VerifierModel
from mtlsign.watermark.verification.reference import make_reference

Stages = Annotated[int, Field(ge=1, le=3)]
#: Carrier inputs that are drawn once; a step takes some of them.
CARRIER_POOL_SIZE = 4096


def decorrelate(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    steps: Steps = 100,
    lr: LearningRate = 1e-3,
    strength: LossWeight = 4.0,
    distillation: LossWeight = 2.0,
    codes: BatchSize = 256,
    stages: Stages = 1,
    batch: BatchSize = 128,
) -> AttackOutcome:
    """Minimise strength * mean(r^2) + distillation * KL(marked model || attacked model) with Adam.

    For each coordinate of the tapped features, r is the correlation between the attacked and the marked model
    over random carrier inputs. Both are read in a verifier model whose canonical form is the marked model's.
    """
    require_logits(task)
    data = attacker_view(model, task, resources, seed)
    batch = min(batch, data.size("attacker"))
    verifier, pool = _verifier_model(model, data, seed, stages)
    teacher, attacked = frozen_copy(model), trainable_copy(model).train()
    parameters = dict(attacked.named_parameters())
    marked = verifier.select_weights({n: p.detach() for n, p in model.named_parameters()})
    marked_canonical = verifier.canonicalize(marked)
    gen, batches = seeded_generator("mtlsign/attack/scrub", seed), attacker_batches(data, batch, seed)

    def loss_fn(step: int) -> Tensor:
        x = next(batches)
        inputs = pool[torch.randperm(len(pool), generator=gen)[:codes].to(pool.device)]
        with torch.no_grad():
            before = verifier.features(marked_canonical, inputs).standardised
        canonical = verifier.canonicalize(verifier.select_weights(parameters), differentiable_rounds=2)
        loss = strength * correlation_loss(before, verifier.features(canonical, inputs).standardised)
        if distillation:
            loss = loss + distillation * distillation_from_teacher(attacked, teacher, x)
        return loss

    optimize(loss_fn, attacked.parameters(), steps, resources.learning_rate(lr), resources)
    images = steps * (codes + (batch if distillation else 0))
    return AttackOutcome(recalibrate_batch_norm(attacked, data), steps, images)


def _verifier_model(model: nn.Module, data: Task, seed: int, stages: int) -> tuple[VerifierModel, Tensor]:
    """Return a verifier model with the marked model as W0, and a pool of random carrier inputs for it."""
    try:
        taps = default_taps(model, "free" if stages > 1 else "keyed")[:stages]
    except ModelError as error:
        raise NotApplicableError(error.detail, field="decorrelate") from None
    input_spec = carriers.key_input_spec(data.input_spec)
    kind = carriers.kind_for(input_spec)
    carrier = carriers.parse(carriers.make(kind, CARRIER_POOL_SIZE, input_spec))
    key = seed.to_bytes(8, "big").rjust(32, b"\xa5")
    pool = carrier.inputs(watermark_integers(key, CARRIER_POOL_SIZE)).to(device_of(model))
    reference = make_reference(model, taps, pool[:2])
    return ConvVerifierModel(frozen_copy(model), taps, reference, pool[:2]), pool
