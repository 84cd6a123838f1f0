"""Protocol of an attack: a marked model, a task, the attacker's resources and a seed -> an attacked model.

Every attack is a function `attack(model, task, resources, seed, *, parameter=default, ...)` that returns an
`AttackOutcome` and leaves `model` unchanged. Its keyword arguments are the parameters that `--attacks`
accepts; their annotations hold the limits.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mtlsign.errors import MTLSignError
from mtlsign.schemes.base import Detection, SchemeKey, WatermarkScheme
from mtlsign.schemes.registry import default_scheme
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator

State = Mapping[str, Tensor]

Epochs = Annotated[int, Field(ge=1, le=10_000)]
Steps = Annotated[int, Field(ge=1, le=1_000_000)]
BatchSize = Annotated[int, Field(ge=2, le=65_536)]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
LossWeight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
#: A number, or a fraction of the learning rate with which the model was trained.
LearningRate = (
    Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | Literal["full", "half", "quarter", "tenth"]
)
Kind = Literal["none", "removal", "function_preserving", "ambiguity"]


@dataclass(frozen=True)
class ChannelMix:
    """Change of images: the channels of every pixel are multiplied by a matrix.

    Attributes:
        rows: the matrix, with the weights of one new channel in each row.
    """

    rows: tuple[tuple[float, ...], ...]

    def __str__(self) -> str:
        """Return the text of attack runs, such as `mixed[[0.0,1.0],[1.0,0.0]]`."""
        return f"mixed{json.dumps(self.rows, separators=(',', ':'))}"


@dataclass(frozen=True)
class TokenRenumbering:
    """Change of texts: another number for every token but the padding, 0.

    Attributes:
        numbers: the new number of token i less 1, at place i - 1; a permutation.
    """

    numbers: tuple[int, ...]

    def __str__(self) -> str:
        """Return the text of attack runs, such as `renumbered[13775 words]`."""
        return f"renumbered[{len(self.numbers)} words]"


@dataclass(frozen=True)
class Preprocessing:
    """Change of images that loses information.

    Attributes:
        kind: "smoothed" averages over squares; "quantised" rounds brightness.
        strength: side of the squares in pixels, or levels of brightness.
    """

    kind: Literal["smoothed", "quantised"]
    strength: int

    def __str__(self) -> str:
        """Return the text of attack runs, such as `smoothed[3]`."""
        return f"{self.kind}[{self.strength}]"


Turn = Literal["transposed", "flipped_rows", "flipped_columns", "rotated"]
#: Changes, in order, that a user of the attacked model applies to every input.
InputTransforms = tuple[Turn | Literal["negated"] | ChannelMix | TokenRenumbering | Preprocessing, ...]

_FRACTIONS = {"full": 1.0, "half": 0.5, "quarter": 0.25, "tenth": 0.1}


class AttackDivergedError(Exception):
    """Attack with a loss or weight that is not finite. Recorded as a result, not treated as an error."""


class NotApplicableError(MTLSignError):
    """Attack that is undefined for this model, or that needs a resource which the attacker lacks."""


@dataclass(frozen=True)
class AttackerResources:
    """Resources of the attacker besides the marked model and a tenth of the training data.

    Attributes:
        extra_data_fraction: fraction of the owner's training split that the attacker has, 0 to 1.
        training_lr: peak learning rate with which the model was trained.
        training_optimizer: optimizer with which it was trained.
        key: the owner's opened key; only key-aware attacks use it.
        other_models: state dicts of other models marked from the same W0, with the marked model's names.
        public_base: state dict of a public model from which the marked one was fine-tuned, with its names; it
            may lack tensors.
        transfer_task: another task with data of the attacker's own, for transfer learning.
        on_step: called with (step, steps) during training.
        scheme: watermarking scheme of `key`, and of the attacker's own keys.
    """

    extra_data_fraction: float = 0.0
    training_lr: float = 0.1
    training_optimizer: Literal["sgd", "adam"] = "sgd"
    key: SchemeKey | None = field(default=None, repr=False)
    other_models: Sequence[State] = field(default=(), repr=False)
    public_base: State | None = field(default=None, repr=False)
    transfer_task: Task | None = field(default=None, repr=False)
    on_step: Callable[[int, int], None] = field(default=lambda step, steps: None, repr=False)
    scheme: WatermarkScheme[Any] = field(default_factory=default_scheme, repr=False)

    def learning_rate(self, lr: float | str) -> float:
        """Return a learning rate as a number."""
        return self.training_lr * _FRACTIONS[lr] if isinstance(lr, str) else lr


@dataclass(frozen=True)
class AttackOutcome:
    """Attacked model and the cost of the attack.

    Attributes:
        model: a new module in evaluation mode, with the state dict of a public model.
        steps: optimiser steps.
        images: images used in training, key images and carriers included.
        input_transforms: changes that a user of the model applies to every input.
        detection: for an ambiguity attack, the verifier's result for the attacker's claim.
        tensors: content of the model's file, if it is not the state dict; a verifier reads this file.
        task: task of the attacked model, if it is not the owner's.
    """

    model: nn.Module = field(repr=False)
    steps: int = 0
    images: int = 0
    input_transforms: InputTransforms = ()
    detection: Detection | None = None
    tensors: State | None = field(default=None, repr=False)
    task: Task | None = field(default=None, repr=False)


#: (model, task, resources, seed, **parameters) -> AttackOutcome
Function = Callable[..., AttackOutcome]


@dataclass(frozen=True)
class Attack:
    """Entry of the registry.

    Attributes:
        name: as `--attacks` accepts it.
        run: the attack.
        summary: description in a few words.
        kind: "removal" costs data, steps or accuracy; "function_preserving" costs nothing and keeps the
            function exactly; "ambiguity" claims another party's model.
        variants: parameters that `all` runs, such as "lr=quarter".
        fast: parameters that `fast` runs.
    """

    name: str
    run: Function
    summary: str
    kind: Kind = "removal"
    variants: tuple[str, ...] = ("",)
    fast: tuple[str, ...] = ()


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model."""
    return next(model.parameters()).device


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seed torch's global generator with `parts` inside the block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator("mtlsign/attack", *parts).initial_seed())
        yield


def require_finite(loss: Tensor, step: int) -> None:
    """Raise `AttackDivergedError` unless the loss is finite."""
    value = float(loss.detach())
    if not value - value == 0:
        raise AttackDivergedError(f"the loss was not finite at step {step + 1}")


def parameters_of(function: Function) -> dict[str, tuple[Any, Any]]:
    """Return the parameters of an attack: name -> (annotation, default)."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: (hints[p.name], p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
