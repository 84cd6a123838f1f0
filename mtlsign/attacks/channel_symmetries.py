"""Permuted and scaled channels: changes that preserve the function of any network with channel sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from mtlsign.attacks.base import AttackerResources, AttackOutcome, NotApplicableError
from mtlsign.attacks.equal_function import (
    attacker_images,
    change_where_preserved,
    positive_factors,
    preserved_outcome,
)
from mtlsign.attacks.training import trainable_copy
from mtlsign.errors import ModelError
from mtlsign.models import channel_groups
from mtlsign.models.channel_sets import ChannelSet, ChannelStructure
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator

Which = Literal["inner", "residual", "both"]
#: Labels of the places in random seeds, which never change.
SEED_LABELS = {"inner": "inner", "residual": "stream"}


def permute_channels(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int, *, which: Which = "both"
) -> AttackOutcome:
    """Permute the channels that one kernel writes (inner), those of several (residual), or both."""
    sets = channels_of(model, attacker_images(model, task, resources, seed)).sets
    generator, changed = seeded_generator("mtlsign/attack/permute", seed), trainable_copy(model)
    orders = channel_groups.random_orders(
        sets, lambda channels: which in ("both", place_of(model, channels)), generator
    )
    if not orders:
        raise NotApplicableError("The network has no channels that can change places.", field="model")
    channel_groups.permute_channels(changed, sets, orders)
    return preserved_outcome(model, changed, task, resources, seed)


def scale_inner_channels(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int
) -> AttackOutcome:
    """Scale the channels that one kernel writes, and divide by the scale where they are read."""
    return _scaled(model, task, resources, seed, "inner")


def scale_residual_channels(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int
) -> AttackOutcome:
    """Scale residual channels: one factor for all layers that write a channel and all that read it."""
    return _scaled(model, task, resources, seed, "residual")


def _scaled(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int, place: str
) -> AttackOutcome:
    """Scale the channels of one place in all sets where the function stays."""
    images = attacker_images(model, task, resources, seed)
    sets = channels_of(model, images).sets
    batch_norms = channel_groups.batch_norm_of_conv(model, images[:1])
    generator, like = seeded_generator("mtlsign/attack/scale", SEED_LABELS[place], seed), images
    chosen = [index for index, channels in enumerate(sets) if place_of(model, channels) == place]
    factors = {index: positive_factors(like, generator, sets[index].size) for index in chosen}

    def change(parts: Sequence[int]) -> nn.Module:
        changed = trainable_copy(model)
        for index in parts:
            channel_groups.scale_channels(changed, sets[index], factors[index], batch_norms)
        return changed

    changed = change_where_preserved(model, change, chosen, images)
    return preserved_outcome(model, changed, task, resources, seed)


def channels_of(model: nn.Module, images: Tensor) -> ChannelStructure:
    """Return the channels of the marked model.

    Args:
        model: the marked model.
        images: images that it accepts; only their shape matters.

    Raises:
        NotApplicableError: the channels cannot be followed to the last layer, or there are none.
    """
    try:
        structure = channel_groups.network_channels(model, images)
    except ModelError as error:
        raise NotApplicableError(error.detail, field=error.field) from None
    if not structure.sets:
        raise NotApplicableError(f"The channel groups of {type(model).__name__} are unknown.", field="model")
    return structure


def place_of(model: nn.Module, channels: ChannelSet) -> str:
    """Return "inner" for channels that one kernel writes, "residual" for those of several kernels."""
    return "residual" if len(channel_groups.writing_kernels(model, channels)) > 1 else "inner"
