"""Ambiguity attack on free heads: a head is trained for the attacker's key on an unchanged model.

Such a head passes verification on any model. The verdict on a free head is therefore `needs_commitment`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import AttackerResources, AttackOutcome, LearningRate, Steps
from mtlsign.attacks.training import optimize, trainable_copy
from mtlsign.schemes.mtlsign import MTLSignScheme
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.losses import watermark_loss

Hidden = Annotated[int, Field(ge=1, le=1024)]


def ambiguity_trained_head(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    steps: Steps = 200,
    lr: LearningRate = 1e-2,
    hidden: Hidden = 64,
) -> AttackOutcome:
    """Train only a free head with Adam, on features that are computed once.

    The outcome's `detection` is the verifier's result for the attacker's claim.
    """
    data = attacker_view(model, task, resources, seed)
    scheme = MTLSignScheme(head="free", hidden=hidden)
    key = scheme.generate_key(model, data, seed)
    unchanged = trainable_copy(model)
    features = key.features(unchanged)
    head, labels = key.detector.feature_readout.head, key.labels.float()

    def loss_fn(step: int) -> Tensor:
        return watermark_loss(head(features), labels)

    optimize(loss_fn, head.parameters(), steps, resources.learning_rate(lr), resources)
    detection = scheme.verify(unchanged, key)
    return AttackOutcome(unchanged, steps, steps * key.sample_count, detection=detection)
