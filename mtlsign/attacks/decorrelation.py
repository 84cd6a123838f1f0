"""The carrier scrub: no key, no labels; the response to QR codes is torn away from the stolen model's.

`facts/attacks.md` §F.9: the main removal attack to report.
"""

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
    device_of,
    require_finite,
)
from mtlsign.attacks.training import (
    attacker_batches,
    distillation_from_teacher,
    frozen_copy,
    recalibrate_batch_norm,
    trainable_copy,
)
from mtlsign.errors import ModelError
from mtlsign.models.architectures import default_taps
from mtlsign.tasks import Task
from mtlsign.tasks.base import seeded_generator
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.embedding.losses import correlation_loss
from mtlsign.watermark.keys.opening import watermark_integers
from mtlsign.watermark.verification.graph import VerifierModel
from mtlsign.watermark.verification.reference import make_reference

Stages = Annotated[int, Field(ge=1, le=3)]
#: Codes drawn once; a step takes some of them.
POOL = 4096


def decorrelate(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    steps: Steps = 100,
    lr: LearningRate = 1e-3,
    strength: LossWeight = 4.0,
    distillation: LossWeight = 2.0,
    codes: Batch = 256,
    stages: Stages = 1,
    batch: Batch = 128,
) -> AttackOutcome:
    """Adam on strength·mean(r²) + distillation·KL(stolen ‖ net).

    r is, per coordinate of the tapped features, the correlation over random QR codes between the net and the
    stolen net, both in a verifier's graph whose frame is the stolen model's own.
    """
    data = attacker_view(model, task, budget, seed)
    batch = min(batch, data.size("attacker"))
    graph, images = _graph(model, data, seed, stages)
    teacher, scrubbed = frozen_copy(model), trainable_copy(model).train()
    parameters = dict(scrubbed.named_parameters())
    stolen = graph.read({n: p.detach() for n, p in model.named_parameters()})
    fixed = graph.into_frame(stolen)
    gen = seeded_generator("mtlsign/attack/scrub", seed)
    optimizer = torch.optim.Adam(scrubbed.parameters(), lr=budget.rate(lr))
    for step, x in zip(range(steps), attacker_batches(data, batch, seed), strict=False):
        shown = images[torch.randperm(len(images), generator=gen)[:codes].to(images.device)]
        with torch.no_grad():
            before = graph.features(fixed, shown).standardised
        optimizer.zero_grad(set_to_none=True)
        framed = graph.into_frame(graph.read(parameters), differentiable_rounds=2)
        loss = strength * correlation_loss(before, graph.features(framed, shown).standardised)
        if distillation:
            loss = loss + distillation * distillation_from_teacher(scrubbed, teacher, x)
        loss.backward()
        optimizer.step()
        require_finite(loss, step)
        budget.tick(step + 1, steps)
    count = steps * (codes + (batch if distillation else 0))
    return AttackOutcome(recalibrate_batch_norm(scrubbed, data), steps, count)


def _graph(model: nn.Module, data: Task, seed: int, stages: int) -> tuple[VerifierModel, Tensor]:
    """The attacker's own verifier's graph and random codes in the carrier's geometry."""
    try:
        taps = default_taps(model, "free" if stages > 1 else "keyed")[:stages]
    except ModelError as error:
        raise NotApplicableError(str(error), field="scrub") from None
    side = {} if max(data.height, data.width) <= 64 else {"height": 64, "width": 64}
    carrier = qr.make_carrier(POOL, data.channels, **({"height": data.height, "width": data.width} | side))
    key = seed.to_bytes(8, "big").rjust(32, b"\xa5")
    images = qr.images(watermark_integers(key, POOL), carrier).to(device_of(model))
    skeleton = frozen_copy(model)
    return VerifierModel(skeleton, taps, make_reference(model, taps, images[:2]), images[:2]), images
