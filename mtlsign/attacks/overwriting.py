"""Overwriting: the adversary embeds a mark of his own key over the owner's (paper §4, Table 3)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from mtlsign.attacks import adversary_key
from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackDivergedError,
    AttackerResources,
    AttackOutcome,
    Epochs,
    LossWeight,
    device_of,
    seeded,
)
from mtlsign.attacks.training import trainable_copy
from mtlsign.errors import ModelError
from mtlsign.tasks import Task
from mtlsign.watermark.embedding import training
from mtlsign.watermark.embedding.worker import SingleProcessContext

KeySize = Annotated[int, Field(ge=0, le=4096)]
Images = Annotated[int, Field(ge=0, le=65_536)]


def overwrite(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    epochs: Epochs = 50,
    head: Literal["keyed", "free"] = "keyed",
    lambda2: LossWeight = 1.0,
    n: KeySize = 0,
    images: Images = 0,
) -> AttackOutcome:
    """Phase 2 with a second key on the attacker's data.

    One epoch is one pass over his key set, which the machinery takes as one batch, and as many primary images
    (fewer with `images`): one step of the optimiser. `n` is his key size (0: the head's default), `lambda2`
    his weight of R_DA, whose copies are those of our own default, as are his other settings. The images
    counted are those of his steps; what R_DA's inner loops look at is not counted.
    """
    data = attacker_view(model, task, budget, seed)
    s = adversary_key.adversary_settings(
        budget, seed, model, head=head, lambda2=lambda2, steps=epochs, **({"key_size": n} if n else {})
    )
    count = images or s.key_size or 1
    s = s.model_copy(update={"primary_batch": min(count, data.size("attacker"))})
    _, _, detector = adversary_key.make_adversary_key(model, data, s)
    overwritten = trainable_copy(model)
    rank = SingleProcessContext(device_of(model), show=lambda row: budget.tick(int(row["step"]), epochs))
    try:
        with seeded("overwrite", seed):  # the phases set torch's generator for themselves
            training.embed_watermark(overwritten, data, detector(), s, rank)
    except ModelError as error:
        raise AttackDivergedError(str(error)) from None
    keys = (s.key_size or 0) * len(training.gradient_terms(0, s))
    return AttackOutcome(overwritten, epochs, epochs * (keys + s.primary_batch))
