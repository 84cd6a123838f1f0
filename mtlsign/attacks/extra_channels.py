"""Wider networks with the same function: dummy channels, split channels, and pairs that cancel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from mtlsign.attacks.base import AttackerResources, AttackOutcome
from mtlsign.attacks.channel_symmetries import channels_of
from mtlsign.attacks.channel_widening import FurtherChannels, WiderNetwork, can_be_widened
from mtlsign.attacks.equal_function import attacker_images, change_where_preserved, preserved_outcome
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator

Count = Annotated[int, Field(ge=1, le=1024)]
EvenCount = Annotated[int, Field(ge=2, le=1024, multiple_of=2)]
#: (number of channels of a set, source of random numbers) -> channels to add.
_Choice = Callable[[int, Generator], FurtherChannels]


def dummy_channels(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int, *, count: Count = 16
) -> AttackOutcome:
    """Add channels with random rows to every set; only other dummies read them."""

    def zeros(columns: Tensor, sources: Sequence[int], generator: Generator) -> Tensor:
        return torch.zeros_like(columns[:, :1]).repeat_interleave(len(sources), 1)

    return _widened(
        model,
        task,
        resources,
        seed,
        lambda size, gen: FurtherChannels(_any(size, count, gen), "drawn", zeros),
    )


def split_channels(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    count: Count = 16,
    kind: Literal["halves", "random"] = "halves",
) -> AttackOutcome:
    """Add copies of channels to every set; the columns of copy and original add up to the old ones."""

    def shares(columns: Tensor, sources: Sequence[int], generator: Generator) -> Tensor:
        new = []
        for source in sources:
            part = columns[:, source] / 2
            if kind == "random":
                part = torch.randn(part.shape, generator=generator).to(part) * columns.std()
            columns[:, source] -= part
            new.append(part)
        return torch.stack(new, 1)

    return _widened(
        model,
        task,
        resources,
        seed,
        lambda size, gen: FurtherChannels(_any(size, count, gen), "copied", shares),
    )


def clique_channels(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int, *, count: EvenCount = 16
) -> AttackOutcome:
    """Add pairs of channels with equal random rows to every set; the columns of a pair cancel."""

    def cancelling(columns: Tensor, sources: Sequence[int], generator: Generator) -> Tensor:
        shape = (columns.shape[0], len(sources) // 2, *columns.shape[2:])
        drawn = torch.randn(shape, generator=generator).to(columns) * columns.std()
        return torch.stack([drawn, -drawn], 2).flatten(1, 2)

    def pairs(size: int, generator: Generator) -> FurtherChannels:
        sources = _any(size, count // 2, generator)
        return FurtherChannels([source for source in sources for _ in range(2)], "drawn", cancelling)

    return _widened(model, task, resources, seed, pairs)


def _any(size: int, count: int, generator: Generator) -> list[int]:
    """Draw channels; each occurs as often as any other, up to one time."""
    orders = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
    return torch.cat(orders)[:count].tolist()


def _widened(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int, choose: _Choice
) -> AttackOutcome:
    """Add channels to every set that allows it, and permute the set."""
    images = attacker_images(model, task, resources, seed)
    sets = channels_of(model, images).sets

    def change(parts: Sequence[int]) -> nn.Module:
        wider = WiderNetwork(model)
        for index in parts:
            generator = seeded_generator("mtlsign/attack/extra-channels", seed, index)
            wider.add(sets[index], choose(sets[index].size, generator), generator)
        return wider.finish()

    free = [index for index, channels in enumerate(sets) if can_be_widened(model, channels)]
    changed = change_where_preserved(model, change, free, images)
    return preserved_outcome(model, changed, task, resources, seed)
