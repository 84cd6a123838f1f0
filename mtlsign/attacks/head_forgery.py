"""Head-only forging: a free head trained for the forger's own key on a model that he did not mark.

No weight changes and the head passes on any model (`facts/attacks.md` §C): why a free head's verdict says
`needs_commitment`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from mtlsign.attacks import adversary_key
from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import AttackerResources, AttackOutcome, LearningRate, Steps, require_finite
from mtlsign.attacks.training import trainable_copy
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.losses import watermark_loss
from mtlsign.watermark.verification.detector import verify

Hidden = Annotated[int, Field(ge=1, le=1024)]


def ambiguity_trained_head(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    steps: Steps = 200,
    lr: LearningRate = 1e-2,
    hidden: Hidden = 64,
) -> AttackOutcome:
    """Adam on the head alone, over features that are computed once; the verdict is on the forger's claim."""
    data = attacker_view(model, task, budget, seed)
    s = adversary_key.adversary_settings(budget, seed, model, head="free", hidden=hidden)
    _, _, make_probe = adversary_key.make_adversary_key(model, data, s)
    detector, untouched = make_probe(), trainable_copy(model)
    with torch.no_grad():
        framed = detector.graph.into_frame(detector.graph.read(dict(untouched.named_parameters())))
        features = detector.graph.features(framed, detector.images)
    optimizer = torch.optim.Adam(detector.head.parameters(), lr=budget.rate(lr))
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = watermark_loss(detector.head(features), detector.labels.float())
        loss.backward()
        optimizer.step()
        require_finite(loss, step)
        budget.tick(step + 1, steps)
    verdict = verify(untouched.state_dict(), make_probe(detector.head.to_bytes()))
    return AttackOutcome(untouched, steps, steps * detector.spec.n, verdict=verdict)
