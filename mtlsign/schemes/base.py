"""Protocol of watermarking schemes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

from torch import Tensor, nn

from mtlsign.tasks import Task
from mtlsign.watermark.embedding.worker import WorkerContext


class SchemeKey(Protocol):
    """Secret with which a watermark is embedded and detected."""

    @property
    def labels(self) -> Tensor:
        """Bits of the watermark, [n]."""

    @property
    def sample_count(self) -> int:
        """Number of inputs in one evaluation of the watermark loss; 0 if it reads weights alone."""

    def with_labels(self, labels: Tensor) -> Self:
        """Return the same key with other bits (float32 [n], 0 or 1), such as wrong ones."""


@dataclass(frozen=True)
class SchemeSettings:
    """Settings of an embedding.

    Attributes:
        steps: steps of the optimiser.
        batch: primary samples in a step.
        training_lr: peak learning rate with which the model was trained.
        seed: seed of all random choices.
        options: settings of one scheme, by name.
    """

    steps: int
    batch: int
    training_lr: float
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SchemeResult:
    """Cost and measurements of an embedding.

    Attributes:
        steps: steps of the optimiser.
        images: primary and key images in these steps.
        rows: metrics during training.
        measured: accuracies of the model before and after.
    """

    steps: int
    images: int
    rows: list[dict[str, Any]] = field(repr=False)
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Detection:
    """Result of a detection.

    Attributes:
        matched: bits that agree with the key.
        n: bits of the key.
        evidence_bits: -log2 of the probability of so many matches with a random key.
        accepted: whether the evidence reaches the required minimum.
        status: "accepted", "rejected", or another state of the scheme.
        reason: why the model could not be read; None if it was read.
        null_rate: probability of one match with a random key, which the evidence assumes.
    """

    matched: int
    n: int
    evidence_bits: float
    accepted: bool
    status: str
    reason: str | None = None
    null_rate: float = 0.5

    @property
    def accuracy(self) -> float:
        """Fraction of matching bits."""
        return self.matched / self.n


@dataclass(frozen=True)
class Forgery:
    """False claim: a key for a model that its claimant did not mark.

    Attributes:
        method: how the key was made.
        tries: keys that were tried; 1 for a computed key.
        seconds: duration, in seconds.
        detection: result of the verifier for the best key.
    """

    method: str
    tries: int
    seconds: float
    detection: Detection


KeyT = TypeVar("KeyT", bound=SchemeKey)
Access = Literal["white-box", "black-box"]


class WatermarkScheme(Protocol[KeyT]):
    """Watermarking scheme: keys, embedding, detection.

    Attributes:
        name: name in the registry.
        access: whether detection reads weights ("white-box") or queries the model ("black-box").
        needs_commitment: whether a claimant can choose a key that fits a given model, so that a detection
            is evidence only if the key was fixed before the model was published.
        default_steps: optimiser steps of an embedding by default.
    """

    name: ClassVar[str]
    access: ClassVar[Access]
    needs_commitment: ClassVar[bool]
    default_steps: ClassVar[int]

    def with_key_options(self, **options: Any) -> WatermarkScheme[KeyT]:
        """Return the scheme with other options of `generate_key`; None stands for a default."""

    def unsupported_reason(self, model: nn.Module, task: Task) -> str | None:
        """Return why the scheme cannot mark this model for this task; None if it can."""

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Replace the layers that the scheme changes, such as an output layer, in place.

        Args:
            model: an unmarked model, before `generate_key`; or a new one, before marked weights are loaded.
            task: its primary task.
        """

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> KeyT:
        """Generate a key for a model, which serves as the unmarked base model.

        Args:
            model: the model to mark; unchanged.
            task: its primary task.
            seed: the key is derived from it; such a key has no value as evidence.
        """

    def embed(
        self,
        model: nn.Module,
        task: Task,
        key: KeyT,
        settings: SchemeSettings,
        worker: WorkerContext,
    ) -> SchemeResult:
        """Embed the watermark of a key into a model, in place.

        Args:
            model: on the worker's device.
            task: primary task with batches on the worker's device.
            key: key of this scheme.
            settings: settings of the embedding.
            worker: process in which to train.

        Raises:
            ModelError: the model cannot be marked, or training diverged.
        """

    def verify(self, model: nn.Module, key: KeyT, tensors: Mapping[str, Tensor] | None = None) -> Detection:
        """Detect the watermark of a key in a model. A failed detection is a result, not an error.

        Args:
            model: the suspect.
            key: key of this scheme.
            tensors: content of the suspect's file, if it is not the state dict.
        """

    def null_rate(self, key: KeyT) -> float:
        """Return the probability that an unmarked model matches one bit or key sample of a key."""

    def watermark_loss(self, model: nn.Module, key: KeyT) -> Tensor | None:
        """Return the loss of the key's bits with gradients, for key-aware attacks; None if there is none."""

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery | None:
        """Make a false claim on an unmarked model in the cheapest known way; None if no way is known.

        Args:
            model: a model that the claimant did not mark; unchanged.
            task: its primary task.
            seed: seed of all random choices.
        """
