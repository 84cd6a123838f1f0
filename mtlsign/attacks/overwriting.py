"""Overwriting: the adversary embeds a mark of his own key over the owner's (paper §4, Table 3)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from mtlsign.attacks import adversary_key
from mtlsign.attacks.attacker_data import attackers
from mtlsign.attacks.base import AttackDivergedError, Attacked, Budget, Epochs, Weight, device_of, seeded
from mtlsign.attacks.training import stolen_copy
from mtlsign.errors import ModelError
from mtlsign.tasks import Task
from mtlsign.watermark.embedding import training
from mtlsign.watermark.embedding.worker import Alone

KeySize = Annotated[int, Field(ge=0, le=4096)]
Images = Annotated[int, Field(ge=0, le=65_536)]


def overwrite(
    model: nn.Module,
    task: Task,
    budget: Budget,
    seed: int,
    *,
    epochs: Epochs = 50,
    head: Literal["keyed", "free"] = "keyed",
    lambda2: Weight = 1.0,
    n: KeySize = 0,
    images: Images = 0,
) -> Attacked:
    """Phase 2 with a second key on the attacker's data.

    One epoch is one pass over his key set, which the machinery takes as one batch, and as many primary images
    (fewer with `images`): one step of the optimiser. `n` is his key size (0: the head's default), `lambda2`
    his weight of R_DA, whose copies are those of our own default, as are his other settings. The images
    counted are those of his steps; what R_DA's inner loops look at is not counted.
    """
    data = attackers(model, task, budget, seed)
    s = adversary_key.settings(
        budget, seed, model, head=head, lambda2=lambda2, steps=epochs, **({"key_size": n} if n else {})
    )
    count = images or s.key_size or 1
    s = s.model_copy(update={"primary_batch": min(count, data.size("attacker"))})
    _, _, probe = adversary_key.claim(model, data, s)
    overwritten = stolen_copy(model)
    rank = Alone(device_of(model), show=lambda row: budget.tick(int(row["step"]), epochs))
    try:
        with seeded("overwrite", seed):  # the phases set torch's generator for themselves
            training.watermark(overwritten, data, probe(), s, rank)
    except ModelError as error:
        raise AttackDivergedError(str(error)) from None
    keys = (s.key_size or 0) * len(training.terms(0, s))
    return Attacked(overwritten, epochs, epochs * (keys + s.primary_batch))
