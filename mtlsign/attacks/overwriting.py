"""Overwriting: the attacker embeds a second watermark with another key (paper, section 4, Table 3)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import (
    AttackDivergedError,
    AttackerResources,
    AttackOutcome,
    Epochs,
    LossWeight,
    NotApplicableError,
    device_of,
    seeded,
)
from mtlsign.attacks.training import trainable_copy
from mtlsign.errors import ModelError, SettingsError
from mtlsign.schemes.base import SchemeSettings
from mtlsign.schemes.mtlsign import MTLSignScheme
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.worker import SingleProcessContext

KeySize = Annotated[int, Field(ge=0, le=4096)]
Images = Annotated[int, Field(ge=0, le=65_536)]
Margin = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]


def overwrite(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    epochs: Epochs = 50,
    head: Literal["same", "spread", "keyed", "free"] = "same",
    lambda2: LossWeight = 1.0,
    n: KeySize = 0,
    images: Images = 0,
    margin: Margin = 0.0,
) -> AttackOutcome:
    """Embed a second watermark with the attacker's data; the marked model serves as W0.

    One epoch is one step of the optimiser: the attacker's key set as one batch, and as many primary images
    (128 if the head reads none), or `images` of them. `head` is that of the owner's key unless it is given.
    `n` is the attacker's key size (0: the default of the head), `lambda2` the attacker's weight of R_DA, and
    `margin` that of a spread head (0: 4, which is the default of most tasks). Other settings are the defaults
    of a task that is not built in. The images counted are those of the steps, without those of R_DA's inner
    loops.
    """
    data = attacker_view(model, task, resources, seed)
    if head != "same" and not isinstance(resources.scheme, MTLSignScheme):
        raise NotApplicableError(f"{resources.scheme.name} has no heads. Omit head.", field="head")
    options = {} if head == "same" else {"head": head}
    try:
        scheme = resources.scheme.with_key_options(key_size=n or None, **options)
        key = scheme.generate_key(model, data, seed)
    except SettingsError as error:
        raise NotApplicableError(f"The key cannot have these options: {error.detail}", field="n") from None
    except ModelError as error:
        reason = f"The attacker's data give no key: {error.detail}"
        raise NotApplicableError(reason, field=error.field) from None
    own_settings = {"lambda2": lambda2} | ({"phase2.margin": margin} if margin else {})
    settings = SchemeSettings(
        steps=epochs,
        batch=min(images or key.sample_count or 128, data.size("attacker")),
        training_lr=resources.training_lr,
        seed=seed,
        options=own_settings if isinstance(scheme, MTLSignScheme) else {},
    )
    overwritten = trainable_copy(model)
    worker = SingleProcessContext(
        device_of(model), on_progress=lambda row: resources.on_step(int(row["step"]), epochs)
    )
    try:
        with seeded("overwrite", seed):  # training seeds torch's generator
            result = scheme.embed(overwritten, data, key, settings, worker)
    except ModelError as error:
        raise AttackDivergedError(str(error)) from None
    return AttackOutcome(overwritten, result.steps, result.images)
