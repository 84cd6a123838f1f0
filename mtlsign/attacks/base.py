"""What an attack takes and gives: a stolen model, a task, what the attacker has, a seed → an attacked model
and what it cost.

Every attack is a function `attack(model, task, budget, seed, *, setting=default, …) -> Attacked` that leaves
`model` as it was. Its keyword arguments are its settings; their annotations are their limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mtlsign.errors import MTLSignError
from mtlsign.tasks.base import seeded_generator
from mtlsign.watermark.verification.detector import Verdict, WatermarkDetector

State = Mapping[str, Tensor]

Epochs = Annotated[int, Field(ge=1, le=10_000)]
Steps = Annotated[int, Field(ge=1, le=1_000_000)]
Batch = Annotated[int, Field(ge=2, le=65_536)]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
LossWeight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
#: A learning rate: a number, or a part of the rate that the model was trained with.
LearningRate = (
    Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | Literal["full", "half", "quarter", "tenth"]
)
Kind = Literal["none", "removal", "free", "forgery"]
#: What a thief does, in turn, to every image before the attacked model sees it.
Inputs = tuple[Literal["transposed", "negated"], ...]

_PARTS = {"full": 1.0, "half": 0.5, "quarter": 0.25, "tenth": 0.1}


class AttackDivergedError(Exception):
    """The attack broke its own model (a loss or weight is not finite): a row of the table, nobody's error."""


class NotApplicableError(MTLSignError):
    """The attack is not defined for this model, or needs something that the attacker was not given."""


@dataclass(frozen=True)
class AttackerResources:
    """What the attacker has besides the stolen model and his tenth of the training data.

    Attributes:
        extra: share of the owner's training part that he has too, 0 to 1.
        lr: the (peak) rate that the model was trained with.
        probe: the opened key and head; only attacks that say so look at it.
        copies: other models marked from the same W0 (state dicts with the stolen model's names).
        tick: called with (step, steps) while an attack trains.
    """

    extra: float = 0.0
    lr: float = 0.1
    detector: WatermarkDetector | None = field(default=None, repr=False)
    copies: Sequence[State] = field(default=(), repr=False)
    tick: Callable[[int, int], None] = field(default=lambda step, steps: None, repr=False)

    def rate(self, lr: float | str) -> float:
        """A learning rate as a number."""
        return self.lr * _PARTS[lr] if isinstance(lr, str) else lr


@dataclass(frozen=True)
class AttackOutcome:
    """The attacked model and its cost.

    Attributes:
        model: a new module in evaluation mode; its state dict has the layout of a public model.
        steps: optimiser steps.
        images: images that went through training, key images and codes included.
        inputs: how its user must change every image first (the input symmetries).
        verdict: for a forgery, what a verifier would say of the forger's claim.
    """

    model: nn.Module = field(repr=False)
    steps: int = 0
    images: int = 0
    inputs: Inputs = ()
    verdict: Verdict | None = None


#: (model, task, budget, seed, **settings) -> Attacked
Function = Callable[..., AttackOutcome]


@dataclass(frozen=True)
class Attack:
    """An entry of the catalogue.

    Attributes:
        name: as `--attacks` takes it.
        run: the attack.
        summary: one line.
        kind: "removal" costs data, steps or accuracy; "free" preserves the function exactly; "forgery" claims
            somebody's model.
        variants: settings that `all` runs, such as "lr=quarter".
        fast: settings that `fast` runs.
    """

    name: str
    run: Function
    summary: str
    kind: Kind = "removal"
    variants: tuple[str, ...] = ("",)
    fast: tuple[str, ...] = ()


def device_of(model: nn.Module) -> torch.device:
    """Where a model lies."""
    return next(model.parameters()).device


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Torch's global generator set by `parts` inside, as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator("mtlsign/attack", *parts).initial_seed())
        yield


def require_finite(loss: Tensor, step: int) -> float:
    """The loss as a number. Raises `AttackDivergedError` if it is none."""
    value = float(loss.detach())
    if not value - value == 0:
        raise AttackDivergedError(f"the loss was not finite at step {step + 1}")
    return value


def settings_of(function: Function) -> dict[str, tuple[Any, Any]]:
    """An attack's settings: name -> (annotation, default)."""
    import inspect
    import typing

    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: (hints[p.name], p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
