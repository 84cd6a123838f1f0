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
from mtlsign.attacks.attacker_data import attackers
from mtlsign.attacks.base import Attacked, Budget, Rate, Steps, require_finite
from mtlsign.attacks.training import stolen_copy
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.losses import watermark_loss
from mtlsign.watermark.verification.detector import verify

Hidden = Annotated[int, Field(ge=1, le=1024)]


def forge_head(
    model: nn.Module,
    task: Task,
    budget: Budget,
    seed: int,
    *,
    steps: Steps = 200,
    lr: Rate = 1e-2,
    hidden: Hidden = 64,
) -> Attacked:
    """Adam on the head alone, over features that are computed once; the verdict is on the forger's claim."""
    data = attackers(model, task, budget, seed)
    s = adversary_key.settings(budget, seed, model, head="free", hidden=hidden)
    _, _, make_probe = adversary_key.claim(model, data, s)
    probe, untouched = make_probe(), stolen_copy(model)
    with torch.no_grad():
        framed = probe.graph.into_frame(probe.graph.read(dict(untouched.named_parameters())))
        features = probe.graph.features(framed, probe.images)
    optimizer = torch.optim.Adam(probe.head.parameters(), lr=budget.rate(lr))
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = watermark_loss(probe.head(features), probe.labels.float())
        loss.backward()
        optimizer.step()
        require_finite(loss, step)
        budget.tick(step + 1, steps)
    verdict = verify(untouched.state_dict(), make_probe(probe.head.to_bytes()))
    return Attacked(untouched, steps, steps * probe.spec.n, verdict=verdict)
